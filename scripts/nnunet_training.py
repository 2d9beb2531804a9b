"""One training of nnU-Net 2.8.1 with a given number of steps, then its validation in whole images.

  PYTHON_WITH_NNUNETV2 nnunet_training.py DATASET_ID CONFIGURATION FOLD EPOCHS ITERATIONS SEED DEVICE [MINUTES]

For compare_training.py and bench_recipes.py, which run it in nnU-Net's interpreter with nnU-Net's environment variables
set. It resumes from nnU-Net's last checkpoint if there is one. With MINUTES it trains for this time instead: nnU-Net's
polynomial schedule follows the time, from the first step on, and the number of steps is written to steps.txt.
NNUNET_MIRRORING=0 predicts without mirrored copies.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

SAVED_EVERY = 10  # epochs


def main() -> None:
    dataset, configuration, fold, epochs, iterations, seed, device, *minutes = sys.argv[1:]
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
        _train_for(trainer, 60 * float(minutes[0])) if minutes else trainer.run_training()
    if os.environ.get("NNUNET_MIRRORING") == "0":
        trainer.inference_allowed_mirroring_axes = None
    trainer.perform_actual_validation()


def _train_for(trainer: nnUNetTrainer, seconds: float) -> None:
    """One epoch of as many steps as the time allows."""
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.lr_scheduler.max_steps = seconds  # the schedule counts seconds instead of epochs
    start, steps = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        trainer.lr_scheduler.step(elapsed)
        trainer.train_step(next(trainer.dataloader_train))
        steps += 1
    Path(trainer.output_folder, "steps.txt").write_text(str(steps))
    trainer.current_epoch = trainer.num_epochs
    trainer.on_train_end()


def _seed(seed: int) -> None:
    for start in (random.seed, np.random.seed, torch.manual_seed):
        start(seed)


if __name__ == "__main__":  # nnU-Net's worker processes import this file again
    main()
