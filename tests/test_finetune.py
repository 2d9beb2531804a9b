"""A network starts from another one's weights: equal names are kept, new ones start random, frozen ones stay."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import TINY, Counts, reference_plan, sample_plan
from torch import Tensor, nn

import nnunet_lite
from nnunet_lite.commands.info import show_info
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.nnunet import import_nnunet
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Network, Plan, configuration_changes
from nnunet_lite.reporting.material import read_material
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.finetune import Source, adopt_plan, adopt_weights, freeze, input_names, open_source
from nnunet_lite.workspace import planned_paths

NNUNET = Path(__file__).parent / "data" / "nnunet_models" / "plain_3d"
LUNG = ("background", "lung", "tumour")
STAGE = "previous stage: "
KINDS = pytest.mark.parametrize("kind", ["plain", "residual"])


def network(seed: int, inputs: int = 1, outputs: int = 3, kind: Any = "plain", norm: Any = "instance") -> UNet:
    torch.manual_seed(seed)
    shape = {"features": (4, 6, 8), "strides": ((1, 1), (2, 2), (2, 2)), "kernels": ((3, 3),) * 3}
    spec = Network(kind=kind, norm=norm, blocks=(1, 1, 1), decoder_convolutions=(1, 1), **shape)
    made = UNet(spec, inputs, outputs)
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def adopt(source: UNet, target: UNet, outputs: Any = (LUNG, LUNG), inputs: Any = (("CT",), ("CT",))) -> dict[str, str]:
    return adopt_weights(target, source.state_dict(), inputs, outputs)


def first_layer(made: UNet) -> nn.Conv2d:
    return next(m for m in made.modules() if isinstance(m, nn.Conv2d))


def images(channels: int) -> Tensor:
    return torch.randn(1, channels, 16, 16)


def test_what_is_left_of_the_model_is_stated() -> None:
    """Channels, classes of a first stage, labels and whole heads that this network does not take."""
    stages = (f"{STAGE}lung", f"{STAGE}tumour")
    report = adopt(network(0, 3), network(1, 1), inputs=(("CT", *stages), ("CT",)))
    assert report["unused, inputs"] == "; ".join(stages) and "unused, outputs" not in report
    report = adopt(network(0, 3, 2), network(1, 1), (LUNG[:2], LUNG), (("T1", "T2", stages[0]), ("CT",)))
    assert report["adapted, inputs"] == "CT: mean of T1, T2" and report["unused, inputs"] == stages[0]

    source, target = network(0, outputs=2), network(1)
    heads = [name for name in target.state_dict() if name.startswith("heads.")]
    report = adopt(source, target, (("whole", "core"), LUNG))
    assert report["unused, outputs"] == "whole; core"
    assert report["at random"].startswith(f"{len(heads)} tensors: heads.")
    assert report["taken over"].startswith(f"{len(target.state_dict()) - len(heads)} tensors")


@KINDS
def test_an_equal_network_is_copied_whole(kind: str) -> None:
    source, target, x = network(0, kind=kind), network(1, kind=kind), images(1)
    report = adopt(source, target)
    assert torch.equal(source(x), target(x))
    n_tensors = len(target.state_dict())
    assert report == {"taken over": f"{n_tensors} tensors; 100.0 % of the weights are the model's"}


@pytest.mark.parametrize(
    ("labels", "rows", "report"),
    [
        (
            ("background", "Tumour", "nodule", "lung"),
            (0, 2, None, 1),
            "background: background; Tumour: tumour; nodule: at random; lung: lung",
        ),
        (("organ", "tumour"), (None, 2), "organ: at random; tumour: tumour"),
    ],
    ids=["labels", "regions"],
)
def test_outputs_of_equal_name_are_copied_and_new_ones_start_random(labels: Any, rows: Any, report: str) -> None:
    source, target = network(0, outputs=3), network(1, outputs=len(rows))
    before = [head.weight.clone() for head in target.heads]
    assert adopt(source, target, (LUNG, labels))["adapted, outputs"] == report
    for old, new, random in zip(source.heads, target.heads, before, strict=True):
        for i, row in enumerate(rows):
            assert torch.equal(new.weight[i], random[i] if row is None else old.weight[row])
            assert row is None or torch.equal(new.bias[i], old.bias[row])


@KINDS
@pytest.mark.parametrize(
    ("old", "new"),
    [(("T1",), ("T1", "FLAIR")), (("T1", "T2", "FLAIR"), ("T1",)), (("T1", "T2"), ("PD", "t2", "FLAIR"))],
)
def test_the_response_to_other_channels_keeps_its_size(kind: str, old: tuple[str, ...], new: tuple[str, ...]) -> None:
    source, target = network(0, len(old), kind=kind), network(1, len(new), kind=kind)
    assert "at random" not in adopt(source, target, inputs=(old, new))
    generator = torch.Generator().manual_seed(0)
    sizes = [
        float(first_layer(made)(torch.randn(4, len(names), 64, 64, generator=generator)).detach().std())
        for made, names in ((source, old), (target, new))
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
    w, v = (first_layer(made).weight.detach() for made in (source, target))
    lower = [name.lower() for name in old]
    for i, name in enumerate(new):  # up to the common scale
        expected = w[:, lower.index(name.lower())] if name.lower() in lower else w.mean(1)
        assert torch.cosine_similarity(v[:, i].flatten(), expected.flatten(), 0) == pytest.approx(1, abs=1e-5)


def test_channels_are_matched_by_name_or_without_common_names_in_their_order() -> None:
    source, x = network(0, 2), images(2)
    swapped, other = network(1, 2), network(2, 2)
    adopt(source, swapped, inputs=(("T1", "T2"), ("T2", "T1")))
    torch.testing.assert_close(source(x), swapped(x.flip(1)))
    report = adopt(source, other, inputs=(("T1", "T2"), ("CT", "PET")))
    assert torch.equal(source(x), other(x)) and report["adapted, inputs"] == "CT: T1; PET: T2"


def test_a_second_stage_starts_as_the_network_without_a_first_stage() -> None:
    source, target = network(0, 1), network(1, 3)
    report = adopt(source, target, inputs=(("CT",), ("CT", f"{STAGE}lung", f"{STAGE}tumour")))
    x, stages = images(1), torch.randint(0, 2, (1, 2, 16, 16))
    torch.testing.assert_close(source(x), target(torch.cat([x, stages.float()], 1)))
    assert f"{STAGE}lung: zero" in report["adapted, inputs"]


def test_tensors_that_do_not_fit_stay_random_and_are_reported() -> None:
    source, target = network(0), network(1, norm="none")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    name = "encoder.1.0.0.weight"
    state = source.state_dict() | {name: torch.zeros(1, 2, 3, 3), "extra": torch.zeros(1)}
    report = adopt_weights(target, state, (("CT",), ("CT",)), (LUNG, LUNG))
    assert report["at random"] == f"1 tensors: {name}" and report["not used"].startswith("12 tensors: encoder.0.0.1")
    assert torch.equal(target.state_dict()[name], before[name])
    assert adopt_weights(target, {"extra": torch.zeros(1)}, (("CT",), ("CT",)), (LUNG, LUNG)) == {}
    assert adopt_weights(target, {"heads.0.bias": torch.zeros(3)}, (("CT",), ("CT",)), (LUNG, LUNG)) == {}
    counted, counter = network(0, norm="batch"), "encoder.0.0.1.num_batches_tracked"
    assert adopt_weights(counted, {counter: torch.tensor(7)}, (("CT",), ("CT",)), (LUNG, LUNG)) == {}


def test_a_first_layer_that_stays_random_warns(capfd: pytest.CaptureFixture[str]) -> None:
    source, target = network(0), network(1)
    del (state := source.state_dict())["encoder.0.0.0.weight"]
    adopt_weights(target, state, (("CT",), ("CT",)), (LUNG, LUNG))
    assert "the first layer (encoder.0.0.0.weight) does not fit and stays random" in capfd.readouterr().err


@KINDS
@pytest.mark.parametrize(
    ("part", "moves"), [("encoder", {"upsample", "decoder", "heads"}), ("all-but-head", {"heads"})]
)
def test_frozen_weights_and_statistics_stay(part: Any, moves: set[str], kind: str) -> None:
    made = network(0, kind=kind, norm="batch")
    freeze(made, part)
    made.train()
    made.deep_supervision = True
    before = {name: value.clone() for name, value in made.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack([y.square().mean() for y in made(torch.randn(2, 1, 16, 16))]).sum().backward()
        optimizer.step()
    changed = {name.split(".")[0] for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == moves


def test_a_network_without_such_parts_cannot_be_frozen() -> None:
    with pytest.raises(UserError, match=r"no tensors called encoder\.\* and heads\.\*"):
        freeze(nn.Conv2d(1, 2, 3), "encoder")


# ---------------------------------------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def own(tiny_workspace: Path) -> Plan:
    return Plan.read(planned_paths(tiny_workspace).plans)


@pytest.fixture(scope="module")
def cascade() -> Plan:
    fixture = json.loads((Path(__file__).parent / "data" / "plan_fixtures.json").read_text())[0]
    return reference_plan(fixture)


def renamed(plan: Plan, name: str, **more: Any) -> Plan:
    channels = tuple(c.model_copy(update={"name": name, "normalization": "ct"}) for c in plan.channels)
    return plan.model_copy(update={"channels": channels, **more})


def with_kind(plan: Plan, configuration: str, kind: str) -> Plan:
    planned = plan.configuration(configuration)
    planned = planned.model_copy(update={"network": planned.network.model_copy(update={"kind": kind})})
    return plan.model_copy(update={"configurations": {**plan.configurations, configuration: planned}})


def adopted(own: Plan, model: Plan, configuration: str = "3d_fullres", settings: Settings = Settings()) -> Plan:
    return adopt_plan(own, configuration, Source(Path("m"), model, configuration), settings)


def test_the_plan_of_the_model_is_adopted_but_for_labels_and_channels(own: Plan, cascade: Plan) -> None:
    """The kind of network too: the dataset is planned for a plain one."""
    theirs = renamed(with_kind(cascade, "3d_fullres", "residual"), "mri", axis_order=(2, 0, 1))
    plan = adopted(own, theirs)
    planned, model = plan.configuration("3d_fullres"), theirs.configuration("3d_fullres")
    for field in ("spacing", "patch_size", "batch_size", "network", "resampling"):
        assert getattr(planned, field) == getattr(model, field)
    assert plan.labels == own.labels and [c.name for c in plan.channels] == [c.name for c in own.channels] == ["MRI"]
    assert plan.channels[0].normalization == "ct" and plan.channels[0].statistics == theirs.channels[0].statistics
    assert (plan.axis_order, plan.median_shape) == ((2, 0, 1), tuple(own.median_shape[i] for i in (2, 0, 1)))
    expected = [n * a / b for n, a, b in zip(plan.median_shape, plan.median_spacing, model.spacing, strict=True)]
    assert planned.median_shape == pytest.approx(expected, abs=0.5)
    assert Plan.model_validate_json(plan.to_json()) == plan
    assert plan.configuration("2d") == own.configuration("2d")


def test_a_model_of_the_same_dataset_changes_nothing_of_its_plan(own: Plan) -> None:
    half = tuple(n + 0.5 for n in own.median_shape)  # the median of an even number of cases
    planned = own.configuration("3d_fullres").model_copy(update={"median_shape": half})
    own = own.model_copy(update={"median_shape": half, "configurations": {"3d_fullres": planned}})
    assert configuration_changes(planned, adopted(own, own).configuration("3d_fullres")) == {}


def test_a_run_that_rounded_the_adopted_median_shape_is_resumed(own: Plan, cascade: Plan) -> None:
    """Versions before December 2026 did."""
    finer = cascade.configuration("3d_fullres").model_copy(update={"spacing": (0.7, 0.7, 0.7)})
    plan = adopted(own, cascade.with_configuration("3d_fullres", finer))
    planned = plan.configuration("3d_fullres")
    rounded = planned.model_copy(update={"median_shape": tuple(float(round(n)) for n in planned.median_shape)})
    assert rounded != planned and plan.with_configuration("3d_fullres", rounded).trains_as(plan)
    larger = planned.model_copy(update={"median_shape": tuple(n + 1 for n in planned.median_shape)})
    assert not plan.with_configuration("3d_fullres", larger).trains_as(plan)


def test_images_are_turned_and_a_channel_of_another_name_keeps_its_normalization(own: Plan, cascade: Plan) -> None:
    plan = adopted(own, renamed(cascade, "MRI", orientation="PIR"))
    assert (own.orientation, plan.orientation) == ("RAS", "PIR")
    x, y, z = own.median_shape[::-1]
    assert plan.median_shape[::-1] == (y, z, x)
    assert adopted(own, renamed(cascade, "MRI", orientation=None)).orientation == "RAS"
    plan = adopted(own, renamed(cascade, "CT"), "2d")
    assert plan.channels == own.channels and len(plan.configuration("2d").median_shape) == 2


@pytest.mark.parametrize(
    ("configuration", "kind", "changes", "message"),
    [
        ("2d", "plain", {}, "does not fit 3d_fullres: dimensions 2, here 3"),
        ("3d_fullres", "residual", {"plan.preset": "default"}, "residual, here plain. Take a recipe without"),
        ("3d_fullres", "plain", {"network.norm": "batch"}, "normalisation instance, here batch"),
        (
            "coarse",
            "plain",
            {"plan.spacing": 1},
            r"spacing \[2.0, 2.0, 2.0\], here \[1.0, 1.0, 1.0\]. Leave",
        ),
    ],
)
def test_a_model_that_cannot_fit_is_refused(
    own: Plan, configuration: str, kind: str, changes: dict[str, Any], message: str
) -> None:
    coarse = own.configuration("3d_fullres").model_copy(update={"spacing": (2.0, 2.0, 2.0)})
    model = own.with_configuration("coarse", coarse)
    source = Source(Path("m"), with_kind(model, configuration, kind), configuration)
    with pytest.raises(UserError, match=message):
        adopt_plan(own, "3d_fullres", source, with_changes(Settings(), changes))


def test_inputs_of_a_second_stage_have_names(cascade: Plan) -> None:
    names = input_names(cascade, "3d_cascade_fullres")
    assert len(names) == cascade.n_inputs("3d_cascade_fullres") == len(set(names))
    assert names[: len(cascade.channels)] == input_names(cascade, "3d_lowres")


# ---------------------------------------------------------------------------------------------------- the fold


def source_of(model: Path, dataset: str, fold: str) -> Source:
    plan = sample_plan(Labels(names={"background": 0, "lung": 1}), dataset=dataset)
    with open_source(str(model), Path("nowhere"), plan, fold, "3d_fullres") as source:
        return source


def test_the_fold_to_start_from(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    name = read_json(model / "plans.json")["dataset"]

    def fold(dataset: str, wanted: str) -> str:
        return source_of(model, dataset, wanted).file.parent.name

    assert fold(name, "0") == fold("Other", "3") == "fold_0"
    for copy in ("fold_3", "fold_all"):
        shutil.copytree(model / "fold_0", model / copy)
    assert (fold("Other", "3"), fold(name, "3"), fold(name, "2")) == ("fold_all", "fold_3", "fold_all")
    file = model / "fold_3" / "model.safetensors"
    assert source_of(file, name, "0").file == file
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"is no model folder \(no plans\.json in it\)\. A model is"):
        source_of(tmp_path / "none", name, "0")
    (model / "run.json").unlink()
    with pytest.raises(UserError, match="is no model folder"):
        source_of(file, name, "0")


def test_a_fold_of_nnunet_to_start_from(tmp_path: Path) -> None:
    """From its model folder, a checkpoint in one, and a checkpoint outside of one, which has the plans too."""
    theirs = Path(shutil.copytree(NNUNET, tmp_path / "theirs"))
    (theirs / "fold_0").rename(theirs / "fold_3")
    shutil.copytree(theirs / "fold_3", theirs / "fold_all")
    (theirs / "fold_1").mkdir()
    final, best = theirs / "fold_3" / "checkpoint_final.pth", theirs / "fold_1" / "checkpoint_best.pth"
    for copy in (best, tmp_path / "pretrained.pth"):
        shutil.copy(final, copy)
    name = read_json(theirs / "plans.json")["dataset_name"]
    assert source_of(theirs, name, "3").file == final
    assert source_of(theirs, "Other", "3").file.parent.name == "fold_all"
    for given in (final, best, tmp_path / "pretrained.pth"):
        source = source_of(given, name, "2")
        assert source.file == given and source.configuration == "3d_fullres"
        assert source.plan.configuration("3d_fullres").network.features == (2, 4, 6)
    for fold in ("fold_3", "fold_all"):
        shutil.rmtree(theirs / fold)
    assert source_of(theirs, name, "0").file == best, "where no fold has a final checkpoint"
    best.rename(best.with_name("checkpoint_latest.pth"))
    with pytest.raises(UserError, match=r"no fold has a checkpoint_best\.pth \(fold 1 lacks it\)"):
        source_of(theirs, name, "0")
    (tmp_path / "none.pth").write_bytes(b"none")
    with pytest.raises(UserError, match=r"none\.pth: is no checkpoint"):
        source_of(tmp_path / "none.pth", name, "0")


def test_files_of_other_programs_are_refused_with_what_they_contain(tmp_path: Path, counts: Counts) -> None:
    torch.save({"epoch": 3, "state_dict": {}, "optimizer": {}, "loops": 1}, tmp_path / "lightning.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, says in (
        ("lightning.ckpt", "contains epoch, state_dict, optimizer and 1 more.* nnssl_adaptation_plan, of nnssl"),
        ("tensor.pt", "contains a Tensor, not the entries of a checkpoint. One has network_weights"),
        ("other.safetensors", "is in no model folder of nnlite; it contains conv.weight. A model is a folder"),
    ):
        counts("bad inputs refused in one line")
        with pytest.raises(UserError, match=f"^{tmp_path}/{name}: .*{says}"):
            source_of(tmp_path / name, "x", "0")


# ------------------------------------------------------------------------------------------------- whole trainings

OWN = ("network.features_base", "network.features_max", "training.patch_size")  # the model's, where it is adopted
Tune = Callable[..., str]


@pytest.fixture
def models(tiny_workspace: Path, tmp_path: Path) -> Path:
    """The models of a workspace in which nothing is trained."""
    shutil.copytree(tiny_workspace, tmp_path / "workspace", ignore=shutil.ignore_patterns("models"))
    return tmp_path / "workspace" / "Task04_Hippocampus" / "models"


@pytest.fixture
def tune(models: Path, tiny_settings: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> Tune:
    """Trains for a step from a model and returns the messages: tune(model, {"training.epochs": 2}, fold="1")."""

    def call(model: Path, changes: dict[str, Any], fold: str = "0", name: str = "tuned") -> str:
        short = {"training.epochs": 1, "training.iterations": 1, "inference.mirroring": False}
        kept = {key: value for key, value in tiny_settings.items() if key not in OWN}
        settings = kept | short | {"training.init": str(model), "inference.step_size": 1.0} | changes
        options: dict[str, Any] = {"workspace": models.parents[1], "name": name, "device": "cpu"}
        assert nnunet_lite.train("3d_fullres", fold, settings=settings, **options).scores
        return capfd.readouterr().err

    return call


def encoders_are_equal(one: Path, other: Path) -> bool:
    old, new = (load_file(folder / "fold_0" / "model.safetensors") for folder in (one, other))
    return all(torch.equal(old[name], new[name]) for name in new if name.startswith("encoder."))


@pytest.mark.parametrize("alone", [False, True], ids=["folder", "checkpoint"])
def test_fine_tuning_starts_from_a_model_of_nnunet(models: Path, tune: Tune, tmp_path: Path, alone: bool) -> None:
    model = Path(shutil.copy(NNUNET / "fold_0" / "checkpoint_final.pth", tmp_path / "theirs.pth")) if alone else NNUNET
    messages = tune(model, {"training.freeze": "encoder"})
    assert "starting from" in messages and "100.0 % of the weights are the model's" in messages
    import_nnunet(NNUNET, tmp_path / "imported")
    assert encoders_are_equal(tmp_path / "imported", models / "tuned")
    planned = Plan.read(models / "tuned" / "plans.json").configuration("3d_fullres")
    assert planned.patch_size == (8, 16, 16) and planned.network.features == (2, 4, 6)


def test_fine_tuning_starts_where_the_model_ended(models: Path, tune: Tune, tiny_model: Path, tmp_path: Path) -> None:
    """The model knows the anterior part and one mirrored axis; patch and network are its own, set by no setting."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    plan, run = read_json(model / "plans.json"), read_json(model / "run.json")
    run["settings"]["augmentation"]["mirror_axes"] = [0]
    write_json(model / "run.json", run)
    plan["labels"]["names"] = {"background": 0, "Anterior": 1, "Head": 2}
    write_json(model / "plans.json", plan)
    frozen = {"training.freeze": "encoder", "training.batch_size": None}
    messages = tune(model, frozen)
    lines = [line for line in messages.splitlines() if not line.startswith("validation of ")]
    assert "starting from" in messages and "Posterior: at random" in messages and "held" not in "".join(lines)
    assert "without mirrored copies along axis 1, 2, and this run" in messages and "mirror_axes=[0] keeps" in messages
    assert encoders_are_equal(model, models / "tuned")
    tuned = Plan.read(models / "tuned" / "plans.json").configuration("3d_fullres")
    assert tuned.patch_size == (24, 32, 24) and max(tuned.network.features) == 8

    own = Plan.read(models.parent / "plans.json")
    wider = {"plan.adopt": False, "network.features_max": 16, "network.features_base": 4, "training.patch_voxels": 8000}
    messages = tune(model, wider | {"training.batch_size": None}, name="own_plan")
    assert "starting from" in messages and "at random" in messages and "taken over" in messages
    kept = Plan.read(models / "own_plan" / "plans.json")
    assert kept.channels == own.channels
    assert kept.configuration("3d_fullres").spacing == own.configuration("3d_fullres").spacing
    assert kept.configuration("3d_fullres").network.features == (4, 8, 16) != tuned.network.features

    with pytest.raises(UserError, match=r"--freeze encoder would keep random weights, .*: encoder\."):
        tune(model, wider | frozen, name="other")
    with pytest.raises(UserError, match=r"no layer of it fits .*recipe: --set network.features_base=none"):
        tune(model, {"network.features_base": 3, "network.features_max": 6}, name="other")
    flat = {"training.init": str(model), "plan.adopt": False, "training.patch_size": [32, 32]}
    with pytest.raises(
        UserError, match=r"does not fit 2d: 3D, network plain, here 2D, network plain\. Leave out --set"
    ):
        nnunet_lite.train("2d", 0, settings=flat, workspace=models.parents[1], name="other", device="cpu")
    assert not (models / "other").exists()

    shutil.rmtree(model)  # a run that resumes does not need it; another fold does
    longer = frozen | {"training.epochs": 2}
    assert "resuming from epoch 1 of 2" in tune(model, longer)
    assert Plan.read(models / "tuned" / "plans.json").configuration("3d_fullres") == tuned
    with pytest.raises(UserError, match="is no model folder"):
        tune(model, longer, fold="1")


def test_weights_that_are_damaged_not_finite_or_of_an_unfinished_run_are_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copytree(tiny_model, tmp_path / "model")) / "fold_0" / "model.safetensors"
    weights = load_file(file)
    first = next(name for name in weights if weights[name].ndim > 1)
    weights[first][0, 0] = 7.0
    with safe_open(file, "pt") as opened:
        save_file(weights, file, opened.metadata())
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged: its checksum is wrong"):
        source_of(file, "x", "0")
    weights[first][0, 0] = math.nan
    save_file(weights, file, {"state": "{}"})
    with pytest.raises(UserError, match=r"model\.safetensors: holds weights that are not finite \(" + first):
        source_of(file, "x", "0")
    theirs = torch.load(NNUNET / "fold_0" / "checkpoint_final.pth", weights_only=False)
    next(iter(theirs["network_weights"].values()))[0] = math.nan
    torch.save(theirs, tmp_path / "diverged.pth")
    with pytest.raises(UserError, match=r"diverged\.pth: holds weights that are not finite"):
        source_of(tmp_path / "diverged.pth", "x", "0")
    with pytest.raises(UserError, match=r"only its own command resumes\. Give the model\.safetensors that it ends"):
        source_of(file.with_name("checkpoint.safetensors"), "x", "0")


@pytest.fixture
def whole(models: Path, tiny_settings: dict[str, Any]) -> Path:
    """A model that was trained on all cases of the workspace."""
    short = tiny_settings | {"training.epochs": 1, "training.iterations": 1}
    options: dict[str, Any] = {"workspace": models.parents[1], "name": "whole", "device": "cpu"}
    nnunet_lite.train("3d_fullres", "all", settings=short, **options)
    return models / "whole"


def test_a_model_that_has_seen_the_held_out_cases_is_not_compared(models: Path, tune: Tune, whole: Path) -> None:
    """Also in a zip, and where the model to start from started from such a model itself."""
    zipped, workspace = models / "whole.zip", models.parents[1]
    nnunet_lite.export_model(whole, output=zipped, workspace=workspace)
    why = "fold 0 holds out 2 cases that its initial weights or teachers have seen"
    assert f"warning: {why} ({zipped})" in " ".join(tune(zipped, {}).split())
    assert f"warning: {why} (tuned)" in " ".join(tune(Path("tuned"), {}, name="again").split())
    for name in ("tuned", "again"):
        assert why in show_info(name, workspace=workspace).text
    with pytest.raises(UserError, match=f"again is left out: {why}; tuned is left out: {why}; whole is left out"):
        nnunet_lite.select(workspace=workspace)
    material = read_material(planned_paths(workspace))
    assert f"scores of again are left out: {why}" in material.notes
    assert all(not model.scores.rows for model in material.models)
    short = TINY | {"training.epochs": 1, "training.iterations": 1}
    nnunet_lite.distill("again", fold=0, name="student", workspace=workspace, device="cpu", settings=short)
    assert why in show_info("student", workspace=workspace).text


def test_a_model_of_the_same_fold_is_compared(models: Path, tune: Tune, tiny_model: Path, tmp_path: Path) -> None:
    """Unless it was trained on other cases, and does not say on which ones."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    why = "holds out 2 cases that its initial weights or teachers have seen"
    assert why not in tune(model, {})
    cases = model / "fold_0" / "cases.json"
    older = {key: value for key, value in read_json(cases).items() if key != "images"}
    write_json(cases, older)
    assert why not in tune(model, {}, name="same")
    write_json(cases, older | {"sha256": "of other folds"})
    assert why in " ".join(tune(model, {}, name="other").split())
