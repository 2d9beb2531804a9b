"""The network of a plan is built, and a user's own is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nnunet_lite.errors import UserError
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.unet import UNet, set_deep_supervision
from nnunet_lite.planning.schema import Plan

OWN = """
import torch
from torch import nn

def plain(planned, inputs, outputs):
    conv = nn.Conv3d if len(planned.kernels[0]) == 3 else nn.Conv2d
    return nn.Sequential(conv(inputs, 4, 3, padding=1), nn.ReLU(), conv(4, outputs, 1))

def wrong_shape(planned, inputs, outputs):
    return nn.Conv3d(inputs, outputs + 1, 1)

def fails(planned, inputs, outputs):
    return nn.Conv3d(inputs + 5, outputs, 1)

def nothing(planned, inputs, outputs):
    return None

def one_argument(planned):
    return None

class Deep(nn.Module):
    deep_supervision = False

    def __init__(self, inputs, outputs, give):
        super().__init__()
        self.conv, self.give = nn.Conv3d(inputs, outputs, 1), give

    def forward(self, x):
        y = self.conv(x)
        return self.give(y, nn.functional.avg_pool3d(y, 2)) if self.deep_supervision else y

class DeepInTraining(Deep):
    def forward(self, x):
        return super().forward(x) if self.training else self.conv(x)

def deep_in_training(planned, inputs, outputs):
    return DeepInTraining(inputs, outputs, lambda fine, coarse: [fine, coarse])

def deep(planned, inputs, outputs):
    return Deep(inputs, outputs, lambda fine, coarse: [fine, coarse])

def deep_tuple(planned, inputs, outputs):
    return Deep(inputs, outputs, lambda fine, coarse: (fine, coarse))

def deep_coarse_first(planned, inputs, outputs):
    return Deep(inputs, outputs, lambda fine, coarse: [coarse, fine])

number = 3
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "own_typo.py").write_text("def plain(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_planned_network_is_a_unet(tiny_plan: Plan) -> None:
    network = build_network(tiny_plan, "2d")
    assert isinstance(network, UNet)
    set_deep_supervision(network, True)
    outputs = network(torch.zeros(1, 1, *tiny_plan.configuration("2d").patch_size))
    assert isinstance(outputs, list)


def test_a_network_of_the_users_own(tiny_plan: Plan) -> None:
    network = build_network(tiny_plan, "3d_fullres", "own_networks:plain")
    assert network.training
    set_deep_supervision(network, True)  # it has one head only
    assert network(torch.zeros(2, 1, 8, 8, 8)).shape == (2, 3, 8, 8, 8)


def test_a_network_from_a_file(tiny_plan: Plan, tmp_path: Path) -> None:
    network = build_network(tiny_plan, "3d_fullres", f"{tmp_path / 'own_networks.py'}:plain")
    assert network(torch.zeros(1, 1, 8, 8, 8)).shape[1] == 3
    for name in ("deep", "deep_in_training"):
        assert isinstance(build_network(tiny_plan, "3d_fullres", f"own_networks:{name}", check_heads=True), nn.Module)
    build_network(tiny_plan, "3d_fullres", "own_networks:deep_tuple")  # not checked without check_heads
    assert isinstance(build_network(tiny_plan, "3d_fullres", "/somewhere/else/own_networks.py:plain"), nn.Sequential)
    (tmp_path / "with_a_dataclass.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "@dataclass\nclass Options:\n    size: int = 1\n"
        "def make(planned, inputs, outputs):\n    return nn.Conv3d(inputs, outputs, Options().size)\n"
    )
    assert isinstance(build_network(tiny_plan, "3d_fullres", f"{tmp_path / 'with_a_dataclass.py'}:make"), nn.Conv3d)
    with pytest.raises(UserError, match=r"there is no file .*absent\.py"):
        build_network(tiny_plan, "3d_fullres", f"{tmp_path / 'absent.py'}:plain")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("own_networks:wrong_shape", r"returns \(1, 4, .*not \(1, 3, "),
        ("own_networks:fails", "fails on a batch of shape"),
        ("own_networks:deep_tuple", r"returns tuple for .*deep_supervision = True, not a list that begins with"),
        ("own_networks:deep_coarse_first", r"returns a list of \(1, 3, .*not a list that begins with"),
        ("own_networks:nothing", "returned NoneType, not a torch.nn.Module"),
        ("own_networks:number", "number is not a function"),
        ("own_networks:one_argument", r"TypeError: one_argument.*\(planned network, inputs, outputs\)"),
        ("own_typo.py:plain", "SyntaxError"),
        ("own_networks:absent", "no attribute 'absent'"),
        ("no_such_module:plain", "No module named 'no_such_module'"),
        ("no_colon", "module:function"),
        (":plain", "module:function"),
    ],
)
def test_a_factory_that_cannot_be_used_is_one_line(tiny_plan: Plan, factory: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_network(tiny_plan, "3d_fullres", factory, check_heads=True)
    assert factory in str(error.value)
    assert "\n" not in str(error.value)
