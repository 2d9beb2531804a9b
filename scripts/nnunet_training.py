"""One training of nnU-Net 2.8.1 with a given number of steps, then its validation in whole images.

  PYTHON_WITH_NNUNETV2 nnunet_training.py DATASET_ID FOLD EPOCHS ITERATIONS SEED DEVICE

For compare_training.py, which runs it in nnU-Net's interpreter with nnU-Net's environment variables set.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import torch
from nnunetv2.run.run_training import get_trainer_from_args


def main() -> None:
    dataset, fold, epochs, iterations, seed, device = sys.argv[1:]
    for start in (random.seed, np.random.seed, torch.manual_seed):
        start(int(seed))
    trainer = get_trainer_from_args(dataset, "3d_fullres", int(fold), device=torch.device(device))
    trainer.num_epochs = int(epochs)
    trainer.num_iterations_per_epoch = int(iterations)
    trainer.num_val_iterations_per_epoch = 1  # it is only a curve
    trainer.disable_checkpointing = True
    trainer.run_training()
    trainer.perform_actual_validation()


if __name__ == "__main__":  # nnU-Net's worker processes import this file anew
    main()
