"""An encoder that nnssl trained without labels is read, and a training starts from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import Counts, reference_plan, sample_plan
from torch import Tensor

import nnunet_lite
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.models.nnssl import read_nnssl
from nnunet_lite.models.nnunet import nnunet_tensor_names, read_checkpoint
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning import topology as rules
from nnunet_lite.planning.nnunet import read_network
from nnunet_lite.planning.schema import Network, Plan

LABELS = Labels(names={"background": 0, "lung": 1})
NETWORK = {
    "n_stages": 3,
    "features_per_stage": [4, 6, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 2, 1],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.modules.activation.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
TRAINED = {"spacing": [1, 1, 1], "spacing_style": "onemmiso", "patch_size": [64, 64, 64]}
SPEC = read_network({"architecture": {"network_class_name": "ResidualEncoderUNet", "arch_kwargs": NETWORK},
                     "patch_size": [32, 32, 32]})  # fmt: skip


def preset(name: str, arguments: Any = None) -> dict[str, Any]:
    return {"arch_class_name": name, "arch_kwargs": arguments, "arch_kwargs_requiring_import": None}


def weights_of(state: dict[str, Tensor], spec: Network, prefix: str = "") -> dict[str, Tensor]:
    """Weights by nnU-Net's names, of which a layer has up to four."""
    return {prefix + theirs: value for name, value in state.items() for theirs in nnunet_tensor_names(name, spec)}


def content_of(channels: int = 1, prefix: str = "", **changes: Any) -> dict[str, Any]:
    """What nnssl saves of a small network; `changes` are entries of its adaptation plan."""
    torch.manual_seed(5)
    adaptation = {
        "architecture_plans": preset("ResidualEncoderUNet", NETWORK),
        "pretrain_plan": {"dataset_name": "Dataset745_OpenMind", "plans_name": "nnsslPlans",
                          "configurations": {"onemmiso": TRAINED}},
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": (32, 32, 32),
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
        "key_to_lpe": None,
    }  # fmt: skip
    weights = weights_of(UNet(SPEC, channels, 1).state_dict(), SPEC, prefix)
    about = {"trainer_name": "BaseMAETrainer", "citations": []}
    return {"network_weights": weights, "nnssl_adaptation_plan": adaptation | changes, **about}


def read(content: dict[str, Any], tmp_path: Path, plan: Plan | None = None) -> tuple[Plan, dict[str, Tensor]]:
    torch.save(content, tmp_path / "openmind.pth")
    file = tmp_path / "openmind.pth"
    return read_nnssl(read_checkpoint(file), plan or sample_plan(LABELS), "3d_fullres", file)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.online_"])
def test_the_encoder_gets_our_names_and_the_decoder_keeps_its(tmp_path: Path, prefix: str) -> None:
    own = "online_" * prefix.endswith("online_")
    keys = {"key_to_stem": f"{own}encoder.stem", "key_to_encoder": f"{own}encoder.stages"}
    content = content_of(prefix=prefix, **keys)
    weights = content["network_weights"]
    plan, state = read(content, tmp_path)
    network = UNet(plan.configuration("3d_fullres").network, 1, 2)
    encoder = [name for name in network.state_dict() if name.startswith(("stem.", "encoder."))]
    assert len(encoder) == 42
    for name in encoder:
        assert torch.equal(state[name], weights[prefix + nnunet_tensor_names(name, SPEC)[0]])
    others = {name.removeprefix("online_") for name in state.keys() - set(encoder)}
    assert {"decoder.seg_layers.0.weight", "decoder.stages.1.convs.0.norm.bias"} <= others
    assert not any("all_modules" in name for name in others)


def test_the_plan_is_the_datasets_with_what_the_encoder_needs(tmp_path: Path) -> None:
    own = sample_plan(LABELS, (2.0, 1.0, 1.0), scheme="ct", channels=2)
    plan, _ = read(content_of(), tmp_path, own)
    planned = plan.configuration("3d_fullres")
    assert (plan.dataset, [channel.name for channel in plan.channels]) == (
        "Dataset745_OpenMind",
        ["channel 0 of nnssl"],
    )
    assert (planned.spacing, planned.network, planned.batch_size) == ((1.0, 1.0, 1.0), SPEC, 2)
    assert planned.patch_size == (32, 32, 32) and plan.labels == own.labels

    free = {"configurations": {"noresample": TRAINED | {"spacing": None}}}  # as nnFoundation
    large = content_of(pretrain_plan=free, recommended_downstream_patchsize=[192, 192, 192])
    planned = read(large, tmp_path, own)[0].configuration("3d_fullres")
    assert planned.spacing == (2.0, 1.0, 1.0)
    assert planned.patch_size == (36, 52, 36), "no larger than the median image needs"


def test_resenc_l_is_the_network_of_our_preset(tmp_path: Path) -> None:
    """Of images with equal voxels and a patch of 160. The decoder differs in nothing either."""
    content = content_of(architecture_plans=preset("ResEncL"), recommended_downstream_patchsize=(160, 160, 160))
    fixtures = json.loads((Path(__file__).parent / "data" / "plan_fixtures.json").read_text())
    plans = (reference_plan(fixture, "resenc_l") for fixture in fixtures)
    own = next(plan for plan in plans if "3d_fullres" in plan.configurations)
    expected = rules.default_network("residual", rules.topology_of((1.0, 1.0, 1.0), (160, 160, 160), "residual"))
    changes = {"spacing": (1.0, 1.0, 1.0), "patch_size": (160, 160, 160), "network": expected}
    cubic = own.configuration("3d_fullres").model_copy(update=changes)
    own = own.model_copy(update={"configurations": {"3d_fullres": cubic}})
    with torch.device("meta"):
        state = UNet(expected, 1, 1).state_dict()
    zeros = {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}  # takes no space on disk
    content["network_weights"] = weights_of(zeros, expected)
    assert len(content["network_weights"]) == 956, "as in the published checkpoints"
    plan, found = read(content, tmp_path, own)
    assert plan.configuration("3d_fullres").network == expected
    assert all(found[name].shape == value.shape for name, value in state.items() if name.startswith("encoder."))


def lacking(key: str) -> dict[str, Any]:
    content = content_of()
    del content["nnssl_adaptation_plan"][key]
    return content


def with_weights(change: Any) -> dict[str, Any]:
    content = content_of()
    change(content["network_weights"])
    return content


STEM = "encoder.stem.convs.0.conv.weight"
REFUSED: dict[str, tuple[Any, str]] = {
    "a vision transformer": (
        lambda: content_of(architecture_plans=preset("PrimusM"), key_to_lpe="eva.pos_embed"),
        r"contains a PrimusM, which nnlite does not build\. nnlite starts from a ResEncL, NoSkipResEncL or Resid",
    ),
    "another activation": (
        lambda: content_of(architecture_plans=preset("ResidualEncoderUNet", NETWORK | {"nonlin": "torch.nn.GELU"})),
        "nonlin 'torch.nn.GELU' is not supported",
    ),
    "no arguments of the network": (
        lambda: content_of(architecture_plans=preset("ResidualEncoderUNet")), "is not as nnssl writes it",
    ),
    "an adaptation plan that is a text": (
        lambda: content_of() | {"nnssl_adaptation_plan": "ResEncL"}, "is not as nnssl writes it",
    ),
    "a patch in two dimensions": (
        lambda: content_of(recommended_downstream_patchsize=(32, 32)), "is not as nnssl writes it",
    ),
    "no weights": (lambda: {"nnssl_adaptation_plan": content_of()["nnssl_adaptation_plan"]}, "'network_weights'"),
    "weights that are a list": (lambda: content_of() | {"network_weights": []}, "is not as nnssl writes it"),
    "an entry that is missing": (lambda: lacking("key_to_stem"), "is not as nnssl writes it .*'key_to_stem'"),
    "another prefix": (lambda: content_of(prefix="net."), r"lacks encoder\.stem\.convs\.0\.conv\.weight"),
    "another number of channels": (
        lambda: content_of(pretrain_num_input_channels=2), r"shape \(4, 1, 3, 3, 3\), in the plan's network \(4, 2,",
    ),
    "a layer that is missing": (
        lambda: with_weights(lambda weights: [weights.pop(name) for name in list(weights) if "conv1.conv.b" in name
                                              or "conv1.all_modules.0.b" in name]),
        r"lacks encoder\.stages\.0\.blocks\.0\.conv1\.conv\.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_encoder_of_a_unet_is_refused(tmp_path: Path, case: str, counts: Counts) -> None:
    counts("bad inputs refused in one line")
    make, says = REFUSED[case]
    with pytest.raises(UserError, match=rf"^{tmp_path}/openmind\.pth: .*{says}") as caught:
        read(make(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_training_starts_from_an_encoder(
    tiny_workspace: Path, tiny_settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_workspace, tmp_path / "workspace", ignore=shutil.ignore_patterns("models"))
    models, file, content = tmp_path / "workspace" / "Task04_Hippocampus" / "models", tmp_path / "o.pth", content_of()
    torch.save(content, file)
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\ntags:\n- medical\n---\nlicense: none\n")
    short = {"training.epochs": 1, "training.iterations": 1, "inference.mirroring": False, "inference.step_size": 1.0}
    own = ("network.features_base", "network.features_max", "training.patch_size")
    settings = {key: value for key, value in tiny_settings.items() if key not in own} | short
    settings |= {"training.init": str(file), "training.freeze": "encoder"}
    options: dict[str, Any] = {"workspace": tmp_path / "workspace", "name": "tuned", "device": "cpu"}
    assert nnunet_lite.train("3d_fullres", "0", settings=settings, **options).scores
    lines = capfd.readouterr().err
    for line in (
        f"starting from the encoder of {file}",
        "  licence           cc-by-4.0",
        "  taken over        42 tensors; ",
        "  adapted, inputs   MRI: channel 0 of nnssl",
        "  at random         16 tensors: upsample.0.weight, upsample.0.bias, ",
        "  not used          16 tensors: decoder.transpconvs.0.weight, ",
    ):
        assert line in lines
    assert "mirrored copies" not in lines
    trained = load_file(models / "tuned" / "fold_0" / "model.safetensors")
    for name, theirs in (("stem.0", "stem.convs.0.conv"), ("encoder.2.0.skip.1", "stages.2.blocks.0.skip.1.conv")):
        assert torch.equal(trained[f"{name}.weight"], content["network_weights"][f"encoder.{theirs}.weight"])
    planned = Plan.read(models / "tuned" / "plans.json").configuration("3d_fullres")
    assert (planned.spacing, planned.patch_size, planned.batch_size) == ((1.0, 1.0, 1.0), (32, 32, 32), 2)
    assert "of Dataset745_OpenMind, to start from its weights" in planned.reasons[0]
