"""One training of nnU-Net 2.8.1 with a given number of steps, then its validation in whole images.

  PYTHON_WITH_NNUNETV2 nnunet_training.py DATASET_ID CONFIGURATION FOLD EPOCHS ITERATIONS SEED DEVICE

For compare_training.py, which runs it in nnU-Net's interpreter with nnU-Net's environment variables set. It resumes
from nnU-Net's last checkpoint if there is one.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

SAVED_EVERY = 10  # epochs


def main() -> None:
    dataset, configuration, fold, epochs, iterations, seed, device = sys.argv[1:]
    _seed(int(seed))
    trainer = get_trainer_from_args(dataset, configuration, int(fold), device=torch.device(device))
    trainer.num_epochs = int(epochs)
    trainer.num_iterations_per_epoch = int(iterations)
    trainer.num_val_iterations_per_epoch = 1  # it is only a curve
    trainer.save_every = SAVED_EVERY
    maybe_load_checkpoint(trainer, True, False)
    if trainer.current_epoch:  # a checkpoint of nnU-Net has no state of random numbers
        _seed(int(seed) + trainer.current_epoch)
    if trainer.current_epoch < trainer.num_epochs:
        trainer.run_training()
    trainer.perform_actual_validation()


def _seed(seed: int) -> None:
    for start in (random.seed, np.random.seed, torch.manual_seed):
        start(seed)


if __name__ == "__main__":  # nnU-Net's worker processes import this file again
    main()
