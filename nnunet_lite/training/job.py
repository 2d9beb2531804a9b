"""What decides a fold's training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_lite.planning.schema import Configuration, Plan
from nnunet_lite.settings import Settings
from nnunet_lite.training.distributed import ALONE, Ranks

if TYPE_CHECKING:
    import torch

    from nnunet_lite.training.sampler import CaseArrays

    Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Job:
    """Everything that decides a fold's training. `plan` already has the settings' batch, patch and network.

    `passes` is how many windows and mirrored copies the validation in whole images that follows shows the network, by
    the distance of two windows (`limit.step_sizes`); empty without a validation.
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

    @cached_property
    def planned(self) -> Configuration:
        return self.plan.configuration(self.configuration)

    @cached_property
    def patch(self) -> Shape:
        """The patch as (z, y, x); two-dimensional ones are one voxel thick."""
        size = self.planned.patch_size
        return (1, size[0], size[1]) if len(size) == 2 else (size[0], size[1], size[2])

    @property
    def dimensions(self) -> int:
        return self.planned.dimensions

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Axes of (z, y, x) that augmentation mirrors."""
        offset = 3 - self.dimensions
        axes = self.settings.augmentation.mirror_axes
        return tuple(a + offset for a in (range(self.dimensions) if axes is None else axes))
