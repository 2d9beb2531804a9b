"""What teachers predict is what `nnlite predict` writes; it is kept; and no fold learns from its held-out cases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from samples import FAST, TINY

import nnunet_lite
from nnunet_lite.commands.inventory import clean
from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.inference.predictor import load
from nnunet_lite.inference.teachers import Teacher, find_teachers, predict_teachers
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.pipeline import predicted_part
from nnunet_lite.preprocessing.store import open_case
from nnunet_lite.preprocessing.stored_case import open_array
from nnunet_lite.settings import recipes
from nnunet_lite.training.splits import Split, read_split
from nnunet_lite.workspace import Paths

CONFIGURATION = "3d_fullres"
Find = Callable[..., list[Teacher]]
SMALL = {**TINY, "training.epochs": 1, "training.iterations": 1}


def change_weights(model: Path, factor: float) -> None:
    for file in model.glob("fold_*/model.safetensors"):
        weights = load_file(file)
        save_file({name: factor * value for name, value in weights.items()}, file, {"state": "{}"})


@pytest.fixture(scope="module")
def paths(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A workspace with the models `tiny` and `other`, whose weights differ; `tiny` predicts fast."""
    workspace = tmp_path_factory.mktemp("taught") / "workspace"
    shutil.copytree(tiny_model.parents[2], workspace)
    paths = Paths(workspace / "Task04_Hippocampus")
    for name in {path.name for path in paths.models.iterdir()} - {"tiny"}:
        shutil.rmtree(paths.models / name)
    run = read_json(paths.models / "tiny" / "run.json")
    run["settings"]["inference"] |= {key.partition(".")[2]: value for key, value in FAST.items()}
    write_json(paths.models / "tiny" / "run.json", run)
    shutil.copytree(paths.models / "tiny", paths.models / "other")
    change_weights(paths.models / "other", 1.5)
    return paths


@pytest.fixture(scope="module")
def dataset(paths: Paths) -> Dataset:
    return stored_dataset(paths.dataset)


@pytest.fixture
def find(paths: Paths, dataset: Dataset) -> Find:
    def find(*names: str, fold: str = "all", plan: Plan | None = None) -> list[Teacher]:
        plan = plan or Plan.read(paths.plans)
        return find_teachers(paths, dataset, plan, CONFIGURATION, names, read_split(paths.splits, dataset, fold))

    return find


def test_targets_are_the_probabilities_that_predict_writes(paths: Paths, dataset: Dataset, find: Find) -> None:
    plan, case = Plan.read(paths.plans), dataset.cases[0]
    names, split = ["tiny", "other"], Split("all", (case.id,), (case.id,))

    def predict() -> Path:
        return predict_teachers(find(*names), paths, dataset, plan, CONFIGURATION, split, "cpu")[case.id]

    file = predict()
    found, placement = open_array(file)[:], open_case(paths.preprocessed, plan, CONFIGURATION, case.id).placement
    together = load([paths.models / name for name in names], device="cpu")
    expected = together(case.images[0], probabilities="all").probabilities()
    assert list(expected)[1:] == list(plan.labels.region_names)
    for channel, map_ in zip(found, list(expected.values())[1:], strict=True):
        part = np.asarray(predicted_part(map_, placement), np.float32)
        assert np.abs(channel / np.float32(255) - part).max() <= 1 / 255
    assert 0 < found.mean() < 255

    before = file.stat().st_mtime_ns
    assert predict() == file and file.stat().st_mtime_ns == before
    change_weights(paths.models / "other", 1.1)
    assert predict().parent != file.parent


def test_what_teachers_predict_is_deleted_with_the_cases(paths: Paths, dataset: Dataset, find: Find) -> None:
    plan, case = Plan.read(paths.plans), dataset.cases[1]
    split = Split("all", (case.id,), (case.id,))
    predict_teachers(find("tiny"), paths, dataset, plan, CONFIGURATION, split, "cpu")
    assert str(paths.teachers) in clean(workspace=paths.root.parent).values["files"]


def test_a_fold_learns_from_the_same_fold_alone(paths: Paths, find: Find) -> None:
    shutil.copytree(paths.models / "tiny", paths.models / "two")
    shutil.copytree(paths.models / "two" / "fold_0", paths.models / "two" / "fold_1")
    (paths.models / "two" / "fold_1" / "cases.json").unlink()
    folds = [{teacher.folder.name: teacher.folds for teacher in found}
             for found in (find("tiny", "two"), find("two", fold="0"))]  # fmt: skip
    assert folds == [{"tiny": ["0"], "two": ["0", "1"]}, {"two": ["0"]}]
    for name in ("tiny", "two"):  # nobody knows which cases that of `two` was trained on
        with pytest.raises(UserError, match="has not trained fold 1 here, the one that fold 1 may learn from"):
            find(name, fold="1")


def test_only_the_folds_that_were_found_teach(paths: Paths, dataset: Dataset, find: Find) -> None:
    """Hours may pass between planning and training, in which another fold of the teacher is trained or set aside."""
    plan, case, folder = Plan.read(paths.plans), dataset.cases[2], paths.models / "later"
    shutil.copytree(paths.models / "tiny", folder)
    teachers, split = find("later"), Split("all", (case.id,), (case.id,))

    def predict(found: list[Teacher]) -> np.ndarray:
        file = predict_teachers(found, paths, dataset, plan, CONFIGURATION, split, "cpu")[case.id]
        return np.asarray(open_array(file)[:])

    expected = predict(teachers)
    shutil.rmtree(paths.teachers)
    shutil.copytree(paths.models / "other" / "fold_0", folder / "fold_1")
    np.testing.assert_array_equal(predict(teachers), expected)
    assert (predict(find("later")) != expected).any()
    shutil.rmtree(folder / "fold_0")
    with pytest.raises(UserError, match="later: the weights of fold 0 are gone"):
        predict(teachers)
    shutil.rmtree(folder)


def test_models_that_cannot_teach_are_refused(paths: Paths, find: Find) -> None:
    plan, other = Plan.read(paths.plans), paths.models / "labels"
    with pytest.raises(UserError, match=r"no model unknown of Task04_Hippocampus to learn from\. Its models: .*tiny"):
        find("tiny", "unknown")
    shutil.copytree(paths.models / "tiny", other)
    described = read_json(other / "plans.json")
    described["labels"]["names"]["Posterior"] = 3
    write_json(other / "plans.json", described)
    with pytest.raises(UserError, match="labels: has other labels than"):
        find("labels")
    stage = plan.configuration(CONFIGURATION).model_copy(update={"previous_stage": "2d"})
    second = plan.model_copy(update={"configurations": plan.configurations | {CONFIGURATION: stage}})
    with pytest.raises(UserError, match="second stage of a cascade cannot learn"):
        find("tiny", plan=second)
    (other / "plans.json").write_bytes((paths.models / "tiny" / "plans.json").read_bytes())
    shutil.rmtree(other / "fold_0")
    with pytest.raises(UserError, match="has no trained fold to learn from"):
        find("labels")
    splits = read_json(paths.splits)
    splits[0]["train"].append(splits[0]["val"].pop())
    before = paths.splits.read_bytes()
    write_json(paths.splits, splits)
    try:
        with pytest.raises(UserError, match="fold 0 was trained on other cases than"):
            find("tiny", fold="0")
    finally:
        paths.splits.write_bytes(before)


# ----------------------------------------------------------------------------------------------------- the command


def distill(paths: Paths, *models: str, fold: Any = "all", **options: Any) -> Any:
    changes: dict[str, Any] = {**SMALL, **options.pop("settings", {})}
    return nnunet_lite.distill(
        models, fold=fold, device="cpu", workspace=paths.root.parent, settings=changes, **options
    )


def test_the_network_is_a_model_like_any_other(
    paths: Paths, dataset: Dataset, capfd: pytest.CaptureFixture[str]
) -> None:
    assert distill(paths, "tiny", name="small").scores == {}
    assert "learning from tiny (fold 0)" in capfd.readouterr().err
    folder = paths.models / "small"
    run = read_json(folder / "run.json")
    assert run["settings"]["training"]["teachers"] == ["tiny"] and run["settings"]["loss"]["distillation"] == 0.5
    label_map = load(folder, device="cpu")(dataset.cases[0].images[0])
    assert set(np.unique(label_map)) <= {0, 1, 2}
    capfd.readouterr()
    distill(paths, "tiny", name="small")
    assert "training is finished" in capfd.readouterr().err
    distill(paths, str(paths.models / "tiny"), name="small", epochs=2, settings={"training.epochs": 2})
    err = capfd.readouterr().err
    assert "resuming from epoch 1 of 2" in err and "tiny predicts" not in err
    (paths.models / "tiny").rename(paths.models / "gone")
    before = (folder / "run.json").read_bytes()
    try:
        with pytest.raises(UserError, match="there is no model tiny"):
            longer = SMALL | {"training.teachers": ["tiny"], "training.epochs": 3}
            options = {"name": "small", "device": "cpu", "workspace": paths.root.parent}
            nnunet_lite.train(CONFIGURATION, "all", recipe="distill", settings=longer, **options)
    finally:
        (paths.models / "gone").rename(paths.models / "tiny")
    assert (folder / "run.json").read_bytes() == before, "it would be another length than that of the weights"
    with pytest.raises(UserError, match=r"training\.teachers: \['tiny'\] -> \['tiny', 'other'\]") as refused:
        distill(paths, "tiny", "other", name="small", settings={"training.epochs": 2})
    assert "--force" not in str(refused.value), "distill has no such option"
    assert list(distill(paths, "tiny", fold=0, name="fold", configuration="3d_fullres").scores) == ["0"]


def test_a_teacher_changes_what_is_learned(paths: Paths) -> None:
    changes = {"training.teachers": ["tiny"], "training.validation_iterations": 0}
    for name, share in (("labels only", 0.0), ("both", 0.5), ("none", None)):
        given = SMALL | ({} if share is None else changes | {"loss.distillation": share})
        nnunet_lite.train(CONFIGURATION, "all", name=name, settings=given, device="cpu", workspace=paths.root.parent)
    weights = [
        load_file(paths.models / name / "fold_all" / "model.safetensors") for name in ("labels only", "both", "none")
    ]
    same = [all(bool((one[name] == weights[2][name]).all()) for name in one) for one in weights]
    assert same == [True, False, True]


def test_a_teacher_that_was_trained_again_is_named(paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    """Where its student is resumed, and where a finished one is asked for again."""

    def stop(_: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    def train(**options: Any) -> str:
        settings = SMALL | {"training.epochs": 2, "training.teachers": ["first", "other"]}
        options |= {"settings": settings, "device": "cpu", "workspace": paths.root.parent, "name": "student"}
        nnunet_lite.train(CONFIGURATION, "all", **options)
        return capfd.readouterr().err

    shutil.copytree(paths.models / "tiny", paths.models / "first")
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[stop])
    change_weights(paths.models / "first", 1.1)
    said = (
        "fold all of student learned from other weights of first, its teacher (fold 0); train it again with --restart"
    )
    for state in ("resuming from epoch 1", "training is finished"):
        err = train()
        assert state in err and said in err and "weights of other" not in err
    assert said not in train(restart=True)
    shutil.rmtree(paths.models / "first")
    assert "learned from" not in train()


def test_a_recipe_for_distillation_without_a_teacher_warns(
    paths: Paths, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copy(recipes()["distill"], tmp_path / "copied.toml")
    for recipe, teachers, warns in (("distill", [], True), (str(copy), [], True), ("distill", ["tiny"], False),
                                    ("cpu", [], False)):  # fmt: skip
        options: dict[str, Any] = {"device": "cpu", "workspace": paths.root.parent, "name": Path(recipe).stem}
        changes = SMALL | {"training.teachers": teachers}
        nnunet_lite.train(CONFIGURATION, "all", recipe=recipe, settings=changes, restart=bool(teachers), **options)
        assert ("without a model to learn from: `nnlite distill MODEL`" in capfd.readouterr().err) == warns


def test_a_network_that_mirrors_swaps_the_labels_as_its_teacher_does(
    paths: Paths, capfd: pytest.CaptureFixture[str]
) -> None:
    swap = {"augmentation.mirror_swap": [["Anterior", "Posterior"]]}
    own: dict[str, Any] = {"device": "cpu", "workspace": paths.root.parent}
    nnunet_lite.train(CONFIGURATION, "all", name="swaps", settings=SMALL | swap, **own)
    for settings, warns in (({}, False), ({"augmentation.mirror_axes": [2]}, True),
                            ({"augmentation.mirror_axes": [2]} | swap, False)):  # fmt: skip
        nnunet_lite.distill("swaps", name=f"of swaps {len(settings)}", settings=SMALL | settings, **own)
        assert ("swaps swaps labels where it mirrors" in capfd.readouterr().err) == warns, settings
    nnunet_lite.train(
        CONFIGURATION, "all", name="from swaps", settings=SMALL | {"training.init": "swaps"}, recipe="default", **own
    )
    assert "swaps swaps labels where it mirrors" in capfd.readouterr().err


def test_mistakes_are_told_before_anything_is_made(paths: Paths, tiny_model: Path) -> None:
    before = sorted(paths.models.iterdir())
    for models, settings, message in (
        ((), {}, "no model is given to learn from"),
        (("unknown",), {}, "unknown: is no model folder"),
        ((str(tiny_model),), {}, r"tiny: is no model of Task04_Hippocampus in .*See `nnlite import`"),
        (("tiny",), {"augmentation.pipeline": "batchgenerators"}, r"training\.teachers needs augmentation\.pipeline"),
        (("tiny",), {"training.teachers": ["other"]}, "is what the models are"),
        (("tiny",), {"loss.distillation": 1.5}, r"loss\.distillation = 1\.5"),
    ):
        with pytest.raises(UserError, match=message):
            distill(paths, *models, name="new", settings=settings)
    assert sorted(paths.models.iterdir()) == before
