"""The steps as Python functions: `import nnunet_lite` gives them all, and costs nothing until one is called."""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from samples import TINIEST, Copy

import nnunet_lite
from nnunet_lite import cli
from nnunet_lite.commands.train import fold_names
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import planned_paths

CHANGES = {**TINIEST, "training.patch_size": (32, 32, 32)}


def test_import_is_light() -> None:
    code = "import sys, nnunet_lite; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "numpy", "scipy", "SimpleITK", "nibabel", "matplotlib", "pandas", "sklearn"} & set(loaded)


def test_no_module_replaces_a_step() -> None:
    """An import of a module `nnunet_lite.plan` would, wherever it comes from."""
    modules = {module.name for module in pkgutil.iter_modules(nnunet_lite.__path__)}
    assert "planning" in modules and not modules & set(nnunet_lite.__all__)
    assert all(callable(getattr(nnunet_lite, name)) for name in nnunet_lite.__all__)


def test_every_step_says_what_it_takes() -> None:
    functions = {path.partition(".")[2] for path, _ in cli.COMMANDS.values()}
    for_people = {"show_info", "list_workspace", "clean", "doctor", "cluster"}
    assert set(nnunet_lite.__all__) == functions - for_people | {"load", "UserError"}
    for name in set(nnunet_lite.__all__) - {"UserError"}:
        step = getattr(nnunet_lite, name)
        assert step.__doc__ and inspect.signature(step).return_annotation is not inspect.Signature.empty


def test_from_raw_data_to_a_score(copy_dataset: Copy, hippocampus: Path, tmp_path: Path) -> None:
    """All steps on five real cases, as far as Python code sees them."""
    root, workspace = copy_dataset(5), tmp_path / "ws"
    assert nnunet_lite.check(root).ok and not workspace.exists()

    plan = nnunet_lite.plan(root, workspace=workspace)
    assert plan.dataset == "broken" and plan.n_cases == 5

    summary = nnunet_lite.preprocess(["3d_fullres"], workspace=workspace, workers=0)
    assert summary.made == 5

    scores = nnunet_lite.train("3d_fullres", 0, settings=CHANGES, workspace=workspace, device="cpu")
    assert 0 <= scores.to_json()["0"]["foreground_mean"]["Dice"] <= 1
    assert nnunet_lite.train("3d_fullres", "all", settings=CHANGES, workspace=workspace, device="cpu").scores == {}

    scan = sorted((hippocampus / "imagesTs").iterdir())[0]
    done = nnunet_lite.predict(scan, tmp_path / "out", workspace=workspace, fold=0, device="cpu")
    assert done.files == (tmp_path / "out" / scan.name,) and done.failed == {} and done.folds == ("0",)

    written = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(done.files[0])))
    model = nnunet_lite.load(done.models, folds=[0], device="cpu")
    image = SimpleITK.ReadImage(str(scan))
    array, spacing = SimpleITK.GetArrayFromImage(image), image.GetSpacing()[::-1]
    for given in (str(scan), scan):
        assert np.array_equal(model(given), written)
    assert np.array_equal(model(array, spacing), written), "an array is segmented as its file"
    assert np.array_equal(model(array[None], spacing), written), "with a channel axis too"
    with pytest.raises(UserError, match="has 2 channels, the model expects 1"):
        model(np.stack([array, array]), spacing)

    found = nnunet_lite.evaluate(tmp_path / "out", hippocampus / "labelsTs", surface=False)
    assert [row.prediction_file for row in found.rows] == [tmp_path / "out" / scan.name]

    report = nnunet_lite.check(root)
    for shown in (report, plan, summary, scores, done, model, model(array, spacing), found, found.rows[0]):
        text = repr(shown)
        assert len(text) < 500 and text.count("\n") < 3 and "object at 0x" not in text, text
    for table in (report, plan, done, model, found):
        assert re.match(r"<table><tr><th>.*</th></tr>.*</table>", table._repr_html_())


def test_mistakes_are_exceptions_with_the_same_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image is given"):
        nnunet_lite.predict([], tmp_path / "out", workspace=tmp_path)
    with pytest.raises(UserError, match="no model folder is given"):
        nnunet_lite.load([])
    with pytest.raises(UserError, match=r"there is no dataset 'Nothing'\. Give its folder, or a name in one of: "):
        nnunet_lite.plan("Nothing", workspace=tmp_path)
    with pytest.raises(UserError, match="no dataset is planned in the workspace"):
        nnunet_lite.train("3d_fullres", 0, workspace=tmp_path)
    with pytest.raises(UserError, match="nowhere: is no model folder"):
        nnunet_lite.load(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_folds_of_nnunet_are_adopted(hippocampus: Path, tmp_path: Path) -> None:
    ids = sorted(path.name.removesuffix(".nii.gz") for path in (hippocampus / "labelsTr").iterdir())
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ids[:20], "val": ids[20:]}]))
    nnunet_lite.plan(hippocampus, workspace=tmp_path / "ws", splits=tmp_path / "splits_final.json")
    assert fold_names(planned_paths(tmp_path / "ws")) == ["0"]
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ids, "val": ids[:1]}]))
    with pytest.raises(UserError, match="on both sides"):
        nnunet_lite.plan(hippocampus, workspace=tmp_path / "ws", splits=tmp_path / "splits_final.json")
