"""A network starts from another one's weights: equal names are kept, new ones begin at random, frozen ones stay."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import nnunet_lite
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.nnunet import import_nnunet
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.nnunet import description_from_nnunet
from nnunet_lite.planning.planner import make_plan
from nnunet_lite.planning.schema import Network, Plan
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.finetune import (
    Source,
    WeightReport,
    adopt_plan,
    adopt_weights,
    find_source,
    freeze,
    input_names,
)
from nnunet_lite.workspace import planned_paths

NNUNET = Path(__file__).parent / "data" / "nnunet_models" / "plain_3d"
LUNG = Labels(names={"background": 0, "lung": 1, "tumour": 2})
NODULE = Labels(names={"background": 0, "Tumour": 1, "nodule": 2, "lung": 3})
STAGE = "previous stage: "


def network(seed: int, inputs: int = 1, outputs: int = 3, kind: Any = "plain", norm: Any = "instance") -> UNet:
    torch.manual_seed(seed)
    spec = Network(
        kind=kind,
        features=(4, 6, 8),
        strides=((1, 1), (2, 2), (2, 2)),
        kernels=((3, 3), (3, 3), (3, 3)),
        blocks=(1, 1, 1),
        decoder_convolutions=(1, 1),
        norm=norm,
    )
    made = UNet(spec, inputs, outputs)
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def moved(
    source: UNet, target: UNet, labels: tuple[Labels, Labels] = (LUNG, LUNG), channels: Any = (("CT",), ("CT",))
) -> WeightReport:
    return adopt_weights(target, source.state_dict(), *labels, *channels)


def response(made: UNet, x: Tensor) -> Tensor:
    """Of the first convolution."""
    found: Tensor = next(m for m in made.modules() if isinstance(m, nn.Conv2d))(x)
    return found.detach()


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_the_same_network_is_taken_over_whole(kind: str) -> None:
    source, target = network(0, kind=kind), network(1, kind=kind)
    loaded = moved(source, target)
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(source(x), target(x))
    assert set(loaded.copied) == set(target.state_dict()) and loaded.share == 1
    assert loaded.to_text() == f"  taken over  {len(loaded.copied)} tensors; 100.0 % of the weights are the model's"


def test_labels_of_equal_name_keep_their_outputs_and_new_ones_begin_at_random() -> None:
    source, target = network(0, outputs=3), network(1, outputs=4)
    before = [head.weight.clone() for head in target.heads]
    loaded = moved(source, target, (LUNG, NODULE))
    for old, new, random in zip(source.heads, target.heads, before, strict=True):
        assert torch.equal(new.weight[[0, 1, 3]], old.weight[[0, 2, 1]]) and torch.equal(new.bias[1], old.bias[2])
        assert torch.equal(new.weight[2], random[2])
    assert dict(loaded.outputs) == {
        "background": "background", "Tumour": "tumour", "nodule": "at random", "lung": "lung",
    }  # fmt: skip
    assert "nodule: at random" in loaded.to_text()


def test_regions_are_matched_by_name_too() -> None:
    regions = Labels(names={"background": 0, "organ": (1, 2), "tumour": (2,)}, region_order=(1, 2))
    source, target = network(0, outputs=3), network(1, outputs=2)
    loaded = moved(source, target, (LUNG, regions))
    assert torch.equal(target.heads[0].weight[1], source.heads[0].weight[2])
    assert loaded.outputs == (("organ", "at random"), ("tumour", "tumour"))


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize(
    ("old", "new"),
    [(("T1",), ("T1", "FLAIR")), (("T1", "T2", "FLAIR"), ("T1",)), (("T1", "T2"), ("PD", "t2", "FLAIR"))],
)
def test_the_response_to_other_channels_keeps_its_size(kind: str, old: tuple[str, ...], new: tuple[str, ...]) -> None:
    source, target = network(0, len(old), kind=kind), network(1, len(new), kind=kind)
    loaded = moved(source, target, channels=(old, new))
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, n, 64, 64, generator=generator) for n in (len(old), len(new)))
    sizes = [response(*pair).std() for pair in ((source, x), (target, y))]
    assert sizes[1] == pytest.approx(float(sizes[0]), rel=0.1)
    assert len(loaded.adapted) == 1 and not loaded.random
    w, v = (next(m for m in n.modules() if isinstance(m, nn.Conv2d)).weight.detach() for n in (source, target))
    lower = [name.lower() for name in old]
    for i, name in enumerate(new):  # up to the common scale
        expected = w[:, lower.index(name.lower())] if name.lower() in lower else w.mean(1)
        assert torch.cosine_similarity(v[:, i].flatten(), expected.flatten(), 0) == pytest.approx(1, abs=1e-5)


def test_channels_in_another_order_are_the_same_network() -> None:
    source, target = network(0, 2), network(1, 2)
    moved(source, target, channels=(("T1", "T2"), ("T2", "T1")))
    x = torch.randn(1, 2, 16, 16)
    torch.testing.assert_close(source(x), target(x.flip(1)))


def test_channels_without_a_common_name_are_taken_in_their_order() -> None:
    source, target = network(0, 2), network(1, 2)
    loaded = moved(source, target, channels=(("T1", "T2"), ("CT", "PET")))
    x = torch.randn(1, 2, 16, 16)
    assert torch.equal(source(x), target(x))
    assert loaded.inputs == (("CT", "T1"), ("PET", "T2"))


def test_a_second_stage_starts_as_the_network_that_knows_no_first() -> None:
    source, target = network(0, 1), network(1, 3)
    loaded = moved(source, target, channels=(("CT",), ("CT", f"{STAGE}lung", f"{STAGE}tumour")))
    x, stages = torch.randn(1, 1, 16, 16), torch.randint(0, 2, (1, 2, 16, 16))
    torch.testing.assert_close(source(x), target(torch.cat([x, stages.float()], 1)))
    assert dict(loaded.inputs)[f"{STAGE}lung"] == "zero"


def test_what_does_not_fit_stays_at_random_and_is_told() -> None:
    source, target = network(0), network(1, norm="none")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = source.state_dict() | {"encoder.1.0.0.weight": torch.zeros(1, 2, 3, 3), "extra": torch.zeros(1)}
    loaded = adopt_weights(target, state, LUNG, LUNG, ("CT",), ("CT",))
    assert loaded.random == ("encoder.1.0.0.weight",) and "extra" in loaded.unused
    assert torch.equal(target.state_dict()["encoder.1.0.0.weight"], before["encoder.1.0.0.weight"])
    assert loaded.share < 1
    assert "at random" in loaded.to_text() and "not used" in loaded.to_text()


@pytest.mark.parametrize(
    ("part", "moves"), [("encoder", {"upsample", "decoder", "heads"}), ("all-but-head", {"heads"})]
)
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_frozen_weights_and_statistics_stay(part: Any, moves: set[str], kind: str) -> None:
    made = network(0, kind=kind, norm="batch")
    freeze(made, part)
    made.train()
    made.deep_supervision = True
    before = {name: value.clone() for name, value in made.state_dict().items()}
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack([y.square().mean() for y in made(torch.randn(2, 1, 16, 16))]).sum().backward()
        optimizer.step()
    changed = {name.split(".")[0] for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == moves


def test_a_network_without_such_parts_cannot_be_frozen() -> None:
    with pytest.raises(UserError, match=r"no tensors called encoder\.\* and heads\.\*"):
        freeze(nn.Conv2d(1, 2, 3), "encoder")


@pytest.fixture(scope="module")
def own(tiny_workspace: Path) -> Plan:
    return Plan.read(planned_paths(tiny_workspace).plans)


@pytest.fixture(scope="module")
def cascade() -> Plan:
    fixture = json.loads((Path(__file__).parent / "data" / "plan_fixtures.json").read_text())[0]
    about = description_from_nnunet(fixture["dataset"])
    return make_plan(Fingerprint.model_validate(fixture["fingerprint"]), "Other", about.channels, about.labels)


def renamed(plan: Plan, name: str) -> Plan:
    return plan.model_copy(
        update={"channels": tuple(c.model_copy(update={"name": name, "normalization": "ct"}) for c in plan.channels)}
    )


def test_the_plan_of_the_model_is_adopted_but_for_labels_and_channels(own: Plan, cascade: Plan) -> None:
    """The kind of U-Net too: the data set is planned for a plain one."""
    planned = cascade.configuration("3d_fullres")
    planned = planned.model_copy(update={"network": planned.network.model_copy(update={"kind": "residual"})})
    cascade = cascade.model_copy(update={"configurations": {**cascade.configurations, "3d_fullres": planned}})
    theirs = renamed(cascade, "mri").model_copy(update={"axis_order": (2, 0, 1)})
    made = adopt_plan(own, "3d_fullres", Source(Path("m"), theirs, "3d_fullres"), Settings())
    planned, model = made.configuration("3d_fullres"), theirs.configuration("3d_fullres")
    for field in ("spacing", "patch_size", "batch_size", "network", "resampling"):
        assert getattr(planned, field) == getattr(model, field)
    assert made.labels == own.labels and [c.name for c in made.channels] == [c.name for c in own.channels] == ["MRI"]
    assert made.channels[0].normalization == "ct" and made.channels[0].statistics == theirs.channels[0].statistics
    assert (made.axis_order, made.median_shape) == ((2, 0, 1), tuple(own.median_shape[i] for i in (2, 0, 1)))
    expected = [n * a / b for n, a, b in zip(made.median_shape, made.median_spacing, model.spacing, strict=True)]
    assert planned.median_shape == pytest.approx(expected, abs=0.5)
    assert Plan.model_validate_json(made.to_json()) == made
    assert made.configuration("2d") == own.configuration("2d")


def test_images_are_turned_to_the_orientation_of_the_model(own: Plan, cascade: Plan) -> None:
    theirs = renamed(cascade, "MRI").model_copy(update={"orientation": "PIR"})
    made = adopt_plan(own, "3d_fullres", Source(Path("m"), theirs, "3d_fullres"), Settings())
    assert (own.orientation, made.orientation) == ("RAS", "PIR")
    x, y, z = own.median_shape[::-1]
    assert made.median_shape[::-1] == (y, z, x)
    unknown = theirs.model_copy(update={"orientation": None})
    assert adopt_plan(own, "3d_fullres", Source(Path("m"), unknown, "3d_fullres"), Settings()).orientation == "RAS"


def test_a_channel_of_another_name_keeps_its_normalisation(own: Plan, cascade: Plan) -> None:
    made = adopt_plan(own, "2d", Source(Path("m"), renamed(cascade, "CT"), "2d"), Settings())
    assert made.channels == own.channels
    assert len(made.configuration("2d").median_shape) == 2


@pytest.mark.parametrize(
    ("configuration", "kind", "changes", "message"),
    [
        ("2d", "plain", {}, "does not fit 3d_fullres: dimensions 2, here 3"),
        ("3d_fullres", "residual", {"plan.preset": "default"}, "residual, here plain. Take a recipe without a preset"),
        ("3d_fullres", "plain", {"network.norm": "batch"}, "normalisation instance, here batch"),
    ],
)
def test_a_model_that_cannot_fit_is_refused(
    own: Plan, configuration: str, kind: str, changes: dict[str, Any], message: str
) -> None:
    planned = own.configuration(configuration)
    planned = planned.model_copy(update={"network": planned.network.model_copy(update={"kind": kind})})
    theirs = own.model_copy(update={"configurations": {configuration: planned}})
    with pytest.raises(UserError, match=message):
        adopt_plan(own, "3d_fullres", Source(Path("m"), theirs, configuration), with_changes(Settings(), changes))


def test_inputs_of_a_second_stage_have_names(cascade: Plan) -> None:
    names = input_names(cascade, "3d_cascade_fullres")
    assert len(names) == cascade.n_inputs("3d_cascade_fullres") == len(set(names))
    assert names[: len(cascade.channels)] == input_names(cascade, "3d_lowres")


def test_the_fold_to_start_from(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    name = read_json(model / "plans.json")["dataset"]

    def fold(of: str, wanted: str) -> str:
        return find_source(model, of, wanted).file.parent.name

    assert fold(name, "0") == fold("Other", "3") == "fold_0"
    shutil.copytree(model / "fold_0", model / "fold_3")
    shutil.copytree(model / "fold_0", model / "fold_all")
    assert (fold("Other", "3"), fold(name, "3"), fold(name, "2")) == ("fold_all", "fold_3", "fold_all")
    file = model / "fold_3" / "model.safetensors"
    assert find_source(file, name, "0").file == file
    with pytest.raises(UserError, match=r"is no model folder, nor .* `nnlite import`"):
        find_source(tmp_path, name, "0")
    (model / "run.json").unlink()
    with pytest.raises(UserError, match="is no model folder"):
        find_source(file, name, "0")


def test_a_fold_of_nnunet_to_start_from(tmp_path: Path) -> None:
    """Of its model folder, of a checkpoint in one, and of a checkpoint that is alone, which holds the plans too."""
    theirs = Path(shutil.copytree(NNUNET, tmp_path / "theirs"))
    (theirs / "fold_0").rename(theirs / "fold_3")
    shutil.copytree(theirs / "fold_3", theirs / "fold_all")
    (theirs / "fold_1").mkdir()
    final, best = theirs / "fold_3" / "checkpoint_final.pth", theirs / "fold_1" / "checkpoint_best.pth"
    shutil.copy(final, best)
    shutil.copy(final, tmp_path / "pretrained.pth")
    name = read_json(theirs / "plans.json")["dataset_name"]
    assert find_source(theirs, name, "3").file == final
    assert find_source(theirs, "Other", "3").file.parent.name == "fold_all"
    for given in (final, best, tmp_path / "pretrained.pth"):
        source = find_source(given, name, "2")
        assert source.file == given and source.configuration == "3d_fullres"
        assert source.plan.configuration("3d_fullres").network.features == (2, 4, 6)
    for fold in ("fold_3", "fold_all"):
        shutil.rmtree(theirs / fold)
    with pytest.raises(UserError, match=r"has no trained fold to start from\. Give the file of another checkpoint"):
        find_source(theirs, name, "0")
    (tmp_path / "none.pth").write_bytes(b"none")
    with pytest.raises(UserError, match=r"none\.pth: is no checkpoint"):
        find_source(tmp_path / "none.pth", name, "0")


class Evil:
    """Makes a folder where it is unpickled by a careless reader."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was_run",)


def test_code_in_a_checkpoint_to_start_from_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Callable[..., None]
) -> None:
    counts("bad inputs refused in one line")
    monkeypatch.chdir(tmp_path)
    torch.save({"network_weights": Evil()}, "pretrained.pth")
    with pytest.raises(UserError, match=r"pretrained\.pth: names posix\.mkdir, .* it was not run"):
        find_source(Path("pretrained.pth"), "Other", "0")
    assert not Path("was_run").exists()


@pytest.mark.parametrize("alone", [False, True], ids=["folder", "checkpoint"])
def test_fine_tuning_starts_from_a_model_of_nnunet(
    tiny_workspace: Path, tiny_settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], alone: bool
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models"))
    model = Path(shutil.copy(NNUNET / "fold_0" / "checkpoint_final.pth", tmp_path / "theirs.pth")) if alone else NNUNET
    length = {"training.epochs": 1, "training.iterations": 1, "training.init": str(model), "training.freeze": "encoder"}
    own = ("network.features_base", "network.features_max", "training.patch_size")
    changes = {key: value for key, value in tiny_settings.items() if key not in own} | length
    changes |= {"inference.step_size": 1.0, "inference.mirroring": False}
    assert (
        nnunet_lite.train("3d_fullres", "0", settings=changes, workspace=workspace, name="tuned", device="cpu")
        is not None
    )
    said = capfd.readouterr().err
    assert "starting from" in said and "100.0 % of the weights are the model's" in said
    folder = workspace / "Task04_Hippocampus" / "models" / "tuned"
    import_nnunet(NNUNET, tmp_path / "imported")
    old, new = (load_file(f / "fold_0" / "model.safetensors") for f in (tmp_path / "imported", folder))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in new if name.startswith("encoder."))
    planned = Plan.read(folder / "plans.json").configuration("3d_fullres")
    assert planned.patch_size == (8, 16, 16) and planned.network.features == (2, 4, 6)


def test_fine_tuning_starts_where_the_model_ended(
    tiny_workspace: Path, tiny_model: Path, tiny_settings: dict[str, Any], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The model knows the anterior part alone; patch and network are its own, though nothing here sets them."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    plan = read_json(model / "plans.json")
    plan["labels"]["names"] = {"background": 0, "Anterior": 1, "Head": 2}
    write_json(model / "plans.json", plan)
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models"))
    length = {"training.epochs": 1, "training.iterations": 1, "training.init": str(model)}
    kept = {k: v for k, v in tiny_settings.items() if not k.startswith("network.") and k != "training.patch_size"}
    changes = kept | length | {"training.freeze": "encoder", "training.batch_size": None}
    scores = nnunet_lite.train("3d_fullres", "0", settings=changes, workspace=workspace, name="tuned", device="cpu")
    assert scores.scores
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith("validation of ")]
    assert "starting from" in said and "Posterior: at random" in said and "held" not in "".join(lines)
    folder = workspace / "Task04_Hippocampus" / "models" / "tuned"
    old, new = (load_file(f / "fold_0" / "model.safetensors") for f in (model, folder))
    assert all(torch.equal(old[name], new[name]) for name in new if name.startswith("encoder."))
    assert any(not torch.equal(old[name], new[name]) for name in new if name.startswith("decoder."))
    tuned = Plan.read(folder / "plans.json").configuration("3d_fullres")
    assert tuned.patch_size == (24, 32, 24) and max(tuned.network.features) == 8

    own = Plan.read(workspace / "Task04_Hippocampus" / "plans.json")
    wider = {"plan.adopt": False, "network.features_max": 16, "training.freeze": None, "network.features_base": 4}
    kept_plan: dict[str, Any] = {"workspace": workspace, "name": "own_plan", "device": "cpu"}
    nnunet_lite.train("3d_fullres", "0", settings=changes | wider | {"training.patch_voxels": 8000}, **kept_plan)
    said = capfd.readouterr().err
    assert "starting from" in said and "at random" in said and "taken over" in said
    found = Plan.read(folder.with_name("own_plan") / "plans.json")
    assert (
        found.channels == own.channels
        and found.configuration("3d_fullres").spacing == own.configuration("3d_fullres").spacing
    )
    assert found.configuration("3d_fullres").network.features == (4, 8, 16) != tuned.network.features

    shutil.rmtree(model)  # a run that was begun does not need it any more; another fold would
    again: dict[str, Any] = {"workspace": workspace, "name": "tuned", "device": "cpu"}
    longer = changes | {"training.epochs": 2}
    assert nnunet_lite.train("3d_fullres", "0", settings=longer, **again).scores
    assert "resuming from epoch 1 of 2" in capfd.readouterr().err
    assert Plan.read(folder / "plans.json").configuration("3d_fullres") == tuned
    with pytest.raises(UserError, match="is no model folder"):
        nnunet_lite.train("3d_fullres", "1", settings=longer, **again)


def test_freezing_random_weights_is_a_mistake(
    tiny_workspace: Path, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models"))
    with pytest.raises(UserError, match=r"--freeze encoder would keep random weights\. Give a model with --init"):
        nnunet_lite.train(
            "3d_fullres", "0", settings=tiny_settings | {"training.freeze": "encoder"}, workspace=workspace
        )
