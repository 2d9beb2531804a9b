"""What one fold is trained on and with: the plan after the settings changed it, the cases, the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_lite.errors import UserError
from nnunet_lite.planning.memory import with_memory
from nnunet_lite.planning.planner import limit_sizes, override_sizes
from nnunet_lite.planning.schema import Configuration, Plan
from nnunet_lite.planning.topology import MIN_EDGE, resize_kernels
from nnunet_lite.preprocessing.stored_case import CaseArrays
from nnunet_lite.settings import Settings
from nnunet_lite.training.launch import ALONE, Ranks

if TYPE_CHECKING:
    import torch

    from nnunet_lite.training.callbacks import Callback

_LARGEST_GB = 2000  # no machine has more; a larger step is a typing error that would only fill the memory


@dataclass(frozen=True)
class Job:
    """Everything that decides how one fold is trained.

    Parameters
    ----------
    plan : Plan
        The plan that is trained, see `configure_plan`.
    configuration : str
        Name in the plan, such as "3d_fullres".
    settings : Settings
        Of the run.
    seed : int
        Of this fold.
    folder : Path
        The fold's folder, for checkpoint and metrics.
    device : torch.device
        Of this process.
    training, validation : sequence of CaseArrays
        The cases to train on, and the held-out ones.
    ranks : Ranks
        This process among those that train together.
    passes : mapping of float to int
        How many network passes the final validation takes (windows and mirrored copies), by the window step size
        (see `limits.validation_step_sizes`). Empty without a validation.
    formats : Path or None
        File that keeps which `ComputeFormat` is fastest on which GPU; None to keep nothing.
    callbacks : sequence of callable
        Called after each epoch, see `nnunet_lite.train`.
    first_stage : mapping of str to str
        Of a cascade: folds of the first stage and the fingerprints of their weights, from which this fold learns.
    """

    plan: Plan
    configuration: str
    settings: Settings
    seed: int
    folder: Path
    device: torch.device
    training: Sequence[CaseArrays]
    validation: Sequence[CaseArrays]
    ranks: Ranks = ALONE
    passes: Mapping[float, int] = field(default_factory=dict)
    formats: Path | None = None
    callbacks: Sequence[Callback] = ()
    first_stage: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def planned(self) -> Configuration:
        return self.plan.configuration(self.configuration)

    @cached_property
    def patch(self) -> tuple[int, int, int]:
        """The patch (z, y, x) in voxels; a two-dimensional patch is one voxel thick."""
        size = self.planned.patch_size
        return (1, size[0], size[1]) if len(size) == 2 else (size[0], size[1], size[2])

    @cached_property
    def stages(self) -> list[Job]:
        """The job with each patch of a run whose patches grow (`training.patch_growth`), the smallest one first.

        A batch has as many voxels as with the full patch, so that steps take the same time. Source: arXiv:2510.23241.
        """
        jobs = [self]
        for patch in smaller_patches(self.planned) if self.settings.training.patch_growth else ():
            batch = self.planned.batch_size * math.prod(self.planned.patch_size) // math.prod(patch)
            planned = self.planned.model_copy(update={"patch_size": patch, "batch_size": batch})
            jobs.append(replace(self, plan=self.plan.with_configuration(self.configuration, planned)))
        return jobs[::-1]

    def stage_at(self, progress: float) -> int:
        """Return the index in `stages` at a share of the run; all but the last one take equal parts of the growth."""
        growth, last = self.settings.training.patch_growth, len(self.stages) - 1
        return last if progress >= growth else int(last * progress / growth)

    @property
    def dimensions(self) -> int:
        return self.planned.dimensions

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """The axes of (z, y, x) that augmentation mirrors."""
        axes = self.settings.augmentation.mirrored_axes(self.dimensions)
        return tuple(axis + 3 - self.dimensions for axis in axes)


def smaller_patches(planned: Configuration) -> list[tuple[int, ...]]:
    """Return the smaller patches that the network can pool, the largest first.

    The axis that is longest relative to the median image loses as many voxels as the poolings need, until each axis has
    two voxels in the coarsest feature map, or eight in the finest.
    """
    divisor, patch, found = planned.network.divisor, list(planned.patch_size), []
    while axes := [a for a, (n, d) in enumerate(zip(patch, divisor, strict=True)) if n - d >= max(2 * d, 2 * MIN_EDGE)]:
        longest = max(axes, key=lambda a: (patch[a] / planned.median_shape[a], a))
        patch[longest] -= divisor[longest]
        found.append(tuple(patch))
    return found


def configure_plan(plan: Plan, configuration: str, settings: Settings) -> Plan:
    """Return the plan that is trained: one configuration, with the patch, batch and network of the settings.

    The second stage of a cascade keeps its first stage in the plan, as it was planned.

    Parameters
    ----------
    plan : Plan
        Of the dataset.
    configuration : str
        Which one is trained.
    settings : Settings
        Of the run.

    Raises
    ------
    UserError
        The plan has no such configuration, a cascade has more than two stages, the patch is illegal, the images are too
        small for a U-Net, or a training step needs more memory than any machine has.
    """
    stage = plan.configuration(configuration).previous_stage
    stages = {} if stage is None else {stage: plan.configuration(stage)}
    if any(first.previous_stage is not None for first in stages.values()):
        raise UserError(f"{stage}, the previous stage of {configuration}, has one itself; a cascade has two stages")

    training = settings.training
    changed = limit_sizes(plan, configuration, training.patch_voxels, training.batch_voxels)
    changed = override_sizes(changed, configuration, training.patch_size, training.batch_size)
    planned = changed.configuration(configuration)
    network = planned.network
    if len(network.features) == 1:
        raise UserError(f"the images are too small for the U-Net of {configuration}: not even one pooling fits")

    features = network.features
    if settings.network.features_base or settings.network.features_max:
        base = settings.network.features_base or features[0]
        largest = settings.network.features_max or max(features)
        features = tuple(min(base * 2**i, largest) for i in range(len(features)))
    kernel = settings.network.kernel
    network = network.model_copy(
        update={
            "features": features,
            "kernels": network.kernels if kernel is None else resize_kernels(network.kernels, kernel),
            "norm": settings.network.norm or network.norm,
            "activation": settings.network.activation or network.activation,
        }
    )
    planned = with_memory(planned.model_copy(update={"network": network}), len(plan.channels), plan.labels)
    if planned.memory_gb is not None and planned.memory_gb > _LARGEST_GB:
        raise UserError(f"a training step of {configuration} would take {planned.memory_gb:,.0f} GB of memory",
                        fix="Lower patch_size, batch_size or features, in the plan or in the settings.")  # fmt: skip
    return changed.model_copy(update={"configurations": {configuration: planned, **stages}, "options": None})
