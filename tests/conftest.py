"""Shared by all tests: the bundled data set, and broken copies of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HIPPOCAMPUS = Path(__file__).parent / "data" / "Task04_Hippocampus"


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """40 real cases in MSD layout: 32 in imagesTr and labelsTr, 8 in imagesTs and labelsTs. Not to be written to."""
    return HIPPOCAMPUS


@pytest.fixture
def copy_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Make a copy of the first cases that a test may break: copy_dataset(n=5, name="broken")."""

    def copy(n: int = 5, name: str = "broken") -> Path:
        root = tmp_path / name
        table = json.loads((HIPPOCAMPUS / "dataset.json").read_text())
        table["training"] = table["training"][:n]
        for entry in table["training"]:
            for file in entry.values():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(HIPPOCAMPUS / file, root / file)
        (root / "dataset.json").write_text(json.dumps(table))
        return root

    return copy


@pytest.fixture
def copy_nnunet(copy_dataset: Callable[..., Path]) -> Callable[..., Path]:
    """The same in nnU-Net v2 layout (`_0000`, channel_names, file_ending), each image given once per channel."""

    def copy(n: int = 5, channels: tuple[str, ...] = ("T1",), name: str = "broken", **more: Any) -> Path:
        root = copy_dataset(n, name)
        for path in sorted((root / "imagesTr").iterdir()):
            stem = path.name.removesuffix(".nii.gz")
            for number in range(len(channels)):
                shutil.copy(path, path.with_name(f"{stem}_{number:04d}.nii.gz"))
            path.unlink()
        table = {
            "channel_names": {str(i): channel for i, channel in enumerate(channels)},
            "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
            "numTraining": n,
            "file_ending": ".nii.gz",
        }
        (root / "dataset.json").write_text(json.dumps(table | more))
        return root

    return copy
