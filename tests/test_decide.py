"""Logits that are NaN or infinite are a mistake with a name and a remedy, wherever labels are decided from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nnunet_lite.data.cases import Case
from nnunet_lite.errors import UserError
from nnunet_lite.inference.folder import predict_cases
from nnunet_lite.inference.outputs import ExtraMaps
from nnunet_lite.inference.predictor import Predictor
from nnunet_lite.networks.precision import ComputeFormat


class Overflowing(nn.Module):
    """One value of one class in the first voxel of each window, or in all."""

    def __init__(self, value: float, n_voxels: int | None = 1) -> None:
        super().__init__()
        self.value, self.n_voxels = value, n_voxels

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.cat([x, x, x], 1)
        logits[:, 2].flatten(1)[:, : self.n_voxels] = self.value
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_no_background(
    model: Predictor,
    scans: list[Path],
    tmp_path: Path,
    value: float,
    counts: Callable[..., None],
) -> None:
    counts("bad inputs refused in one line")
    broken = replace(model, networks=(Overflowing(value),))  # type: ignore[arg-type]
    cases = [Case(path.name.removesuffix(".nii.gz"), (path,), None) for path in scans]
    done, failed = predict_cases(broken, cases, tmp_path / "out")
    assert done == [] and sorted(failed) == [case.id for case in cases]
    assert all("NaN or infinite" in why and "\n" not in why for why in failed.values())
    scan = scans[0]
    with pytest.raises(UserError, match=f"^{scan}: .*NaN or infinite.*computed in float32: look at the values"):
        broken(scan)
    half = replace(broken, arithmetic=ComputeFormat(precision="bf16"))
    with pytest.raises(UserError, match="Predict with --precision fp32"):
        half(scan)
    for wanted in (ExtraMaps(("Anterior",)), ExtraMaps(uncertainty=True)):
        _, failed = predict_cases(broken, cases[:1], tmp_path / "out", maps=wanted)
        assert "NaN or infinite" in failed[cases[0].id]
    voting = replace(model, partners=(broken,))
    with pytest.raises(UserError, match="NaN or infinite"):
        voting(scan)


def test_sums_that_are_too_large_for_float16_are_no_background(model: Predictor, scans: list[Path]) -> None:
    """Each logit is a number, but not so its sum over windows in float16."""
    settings = model.settings.model_copy(update={"sums": "float16"})
    large = replace(model, networks=(Overflowing(60000.0, None),), settings=settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Predict with --set inference\.sums=float32"):
        large(scans[0])
