"""The step that is measured is a real one; without a GPU the measurement is refused in one line."""

import json
from pathlib import Path

import pytest
import torch

from nnunet_lite.errors import UserError
from nnunet_lite.networks.precision import Arithmetic
from nnunet_lite.planning.nnunet import plan_from_nnunet
from nnunet_lite.planning.override import limit_sizes
from nnunet_lite.planning.schema import Plan
from nnunet_lite.training.measure import measure_step, train_step

ABOUT = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2}, "numTraining": 200}


@pytest.fixture
def plan() -> Plan:
    plans = json.loads((Path(__file__).parent / "data" / "nnunet_plans.json").read_text())
    return limit_sizes(plan_from_nnunet(plans, ABOUT), "3d_fullres", 8_000, 16_000)


def test_steps_reduce_the_loss_on_one_batch(plan: Plan) -> None:
    torch.manual_seed(0)
    cpu, fp32 = torch.device("cpu"), Arithmetic()
    first = train_step(plan, "3d_fullres", cpu, fp32, steps=1)
    torch.manual_seed(0)
    assert train_step(plan, "3d_fullres", cpu, fp32, steps=4) < first


def test_a_gpu_is_needed(plan: Plan) -> None:
    with pytest.raises(UserError, match="--measure needs a GPU"):
        measure_step(plan, "3d_fullres", torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures GPU memory")
def test_measured_memory_is_near_the_prediction(plan: Plan) -> None:
    predicted = plan.configuration("2d").memory_gb
    measured = measure_step(plan, "2d", torch.device("cuda"))
    assert predicted is not None and measured is not None
    assert measured < predicted * 1.15
