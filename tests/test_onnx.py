"""A model exported as ONNX predicts what torch predicts, without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_inputs import edit, setting
from random_models import planned, predict_preprocessed
from samples import Counts
from torch import nn

from nnunet_lite.data.images import read_image
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json, write_text
from nnunet_lite.inference import onnx as exporter
from nnunet_lite.inference import onnx_runner as runner
from nnunet_lite.inference import predictor
from nnunet_lite.inference.onnx import OPSET, export_onnx
from nnunet_lite.models.checkpoint import load_weights, save_weights
from nnunet_lite.models.folder import FORMAT, MODEL
from nnunet_lite.networks.build import build_network
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.pipeline import preprocess_image
from nnunet_lite.settings import load_settings

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Pair = tuple[predictor.Predictor, runner.OnnxPredictor]
MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tiny"
    differences = export_onnx(tiny_model, out)
    assert list(differences) == ["fold_0.onnx"] and 0 < differences["fold_0.onnx"] < 1e-3
    return out


def load_fp32(folder: Path) -> predictor.Predictor:
    return predictor.load(folder, device="cpu", settings={"inference.precision": "fp32"})


@pytest.fixture(scope="module")
def pair(tiny_model: Path, exported: Path) -> Pair:
    """The same model by torch and by ONNX, with mirroring and half a patch of overlap."""
    return load_fp32(tiny_model), runner.load_onnx(exported)


@pytest.fixture(scope="module")
def make_model(tiny_workspace: Path) -> MakeModel:
    """A model folder with random weights: make_model(folder, configuration, plan changes, folds=..., **settings)."""
    plan = read_json(tiny_workspace / "Task04_Hippocampus" / "plans.json")

    def make(folder: Path, configuration: str, changes: dict[str, Any], folds: int = 1, **run: Any) -> Path:
        made = Plan.model_validate({**plan, **changes})
        settings = load_settings("default", run.pop("settings", {})).model_dump(mode="json")
        write_text(folder / "plans.json", made.to_json())
        write_json(folder / "dataset.json", {"name": "made"})
        about = {"format": FORMAT, "configuration": configuration, "seed": 0, "settings": settings}
        write_json(folder / "run.json", {**about, **run})
        for fold in range(folds):
            torch.manual_seed(fold)
            network = build_network(made, configuration)
            arithmetic = {"precision": "fp32", "channels_last": True}  # the layout that has an operation of our own
            save_weights(
                folder / f"fold_{fold}" / MODEL, network, {"device": "cpu", "arithmetic": arithmetic, "epochs": 0}
            )
        return folder

    return make


def agree(
    model: predictor.Predictor, exported: runner.OnnxPredictor, array: np.ndarray, spacing: tuple[float, ...]
) -> None:
    """Labels are equal on more than 99.99 % of the voxels, and more than one of them is there."""
    expected, found = model(array, spacing), exported(array, spacing)
    assert expected.shape == found.shape == array.shape[-3:] and expected.dtype == found.dtype
    assert (expected == found).mean() > 0.9999
    assert len(np.unique(expected)) > 1, "or this would say nothing"


def test_a_graph_computes_the_logits_of_the_network(exported: Path, pair: Pair) -> None:
    graph = onnx.load(exported / "fold_0.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", OPSET)]
    session, (trained,) = runner.start_session(exported / "fold_0.onnx"), pair[0].networks
    assert ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]) == (["image"], ["logits"])
    for batch in (1, 3):  # not what it was traced with
        x = torch.randn(batch, 1, *pair[0].configuration.patch_size)
        (found,) = session.run(None, {"image": x.numpy()})
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, trained(x).numpy(), atol=1e-3, rtol=0)


def test_nnlite_says_what_reads_it(exported: Path) -> None:
    for path in (exported, exported / "fold_0.onnx"):
        with pytest.raises(UserError, match=r"is no model folder \(it is one as ONNX\)\. .*load_onnx reads it"):
            predictor.load(path)


def test_a_graph_says_what_it_is_and_not_where_it_was_made(exported: Path, tiny_model: Path) -> None:
    graph = onnx.load(exported / "fold_0.onnx")
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert Plan.model_validate_json(metadata["plan"]) == Plan.read(tiny_model / "plans.json")
    assert json.loads(metadata["nnlite"]) == read_json(exported / "onnx.json")
    for file in exported.iterdir():
        content = file.read_bytes()
        for trace in (str(tiny_model.parent), str(Path(exporter.__file__).parent), str(Path(torch.__file__).parent)):
            assert trace.encode() not in content, file.name


def test_logits_of_a_whole_image_are_torchs(pair: Pair, tiny_cases: list[Any]) -> None:
    model, exported = pair
    assert exported.mirror_axes == (0, 1, 2) and exported.step_size == 0.5
    image = tiny_cases[0].image[:]
    expected = predict_preprocessed(model, image).numpy()
    np.testing.assert_allclose(exported.logits(image), expected, atol=1e-3, rtol=0)


def test_files_and_arrays_are_segmented_as_by_torch(pair: Pair, scans: list[Path]) -> None:
    settings = pair[0].settings.model_copy(update={"mirroring": False, "step_size": 0.8})
    model, exported = replace(pair[0], settings=settings), replace(pair[1], mirror_axes=(), step_size=0.8)
    for scan in scans[:2]:
        image = read_image(scan)
        agree(model, exported, image.array, image.geometry.spacing)
        np.testing.assert_array_equal(exported(scan), exported(image.array[0], image.geometry.spacing))
    agree(model, exported, read_image(scans[0]).array[:, :, ::2], (1.0, 2.0, 1.0))  # resampled, and brought back
    with pytest.raises(UserError, match="has 2 channels, the model expects 1"):
        exported(np.zeros((2, 8, 8, 8)))


def test_inputs_are_examined_as_with_torch(pair: Pair, counts: Counts) -> None:
    exported = replace(pair[1], mirror_axes=(), step_size=1.0)
    array = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    cubic = (1.0, 1.0, 1.0)
    expected = exported(array, cubic)
    for same in (array.tolist(), torch.from_numpy(array), array.astype(np.float64)):
        np.testing.assert_array_equal(exported(same, cubic), expected)
    for bad, spacing, says in (
        (np.full((8, 8, 8), np.nan), cubic, "NaN or infinite, as float32: 512 voxels"),
        (np.zeros((0, 8, 8)), cubic, "shape"),
        (array * 1j, cubic, "complex64"),
        (array, (0.0, 1.0, 1.0), "spacing"),
    ):
        counts("bad inputs refused in one line")
        with pytest.raises(UserError, match=says):
            exported(bad, spacing)


class Infinite:
    """A graph whose sums were too large for float16."""

    def run(self, outputs: list[str], given: dict[str, np.ndarray]) -> list[np.ndarray]:
        image = given["image"]
        logits = np.zeros((len(image), 3, *image.shape[2:]), np.float32)
        logits[:, 1, -1] = np.inf
        return [logits]


def test_logits_that_are_not_finite_are_no_background(pair: Pair, scans: list[Path], counts: Counts) -> None:
    counts("bad inputs refused in one line")
    broken = replace(pair[1], sessions=(Infinite(),), mirror_axes=())
    with pytest.raises(UserError, match=rf"^{scans[0]}: .* NaN or infinite .*--precision fp32") as error:
        broken(scans[0])
    assert "\n" not in str(error.value)


def test_two_threads_share_a_model(pair: Pair, scans: list[Path]) -> None:
    exported = replace(pair[1], mirror_axes=(), step_size=1.0)
    alone = [exported(scan) for scan in scans]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(exported, scans * 3))
    for expected, found in zip(alone * 3, together, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_no_torch_is_needed(pair: Pair, exported: Path, scans: list[Path], tmp_path: Path) -> None:
    image = read_image(scans[0])
    np.save(tmp_path / "image.npy", image.array)
    program = """
import sys
sys.modules["torch"] = None  # whoever imports it fails
import numpy as np
from nnunet_lite.inference.onnx_runner import load_onnx
folder, work = sys.argv[1:]
np.save(f"{work}/labels.npy", load_onnx(folder)(np.load(f"{work}/image.npy"), (1.0, 1.0, 1.0)))
"""
    subprocess.run([sys.executable, "-c", program, str(exported), str(tmp_path)], check=True, timeout=100)
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), pair[1](image.array))


def test_2d_residual_regions_and_sides(make_model: MakeModel, tmp_path: Path) -> None:
    """Two channels, of which one counts inside its mask; thick slices along y; regions; two folds; swapped sides."""
    statistics = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"), 1)
    first = {"name": "T1", "normalization": "zscore", "use_mask": True, "statistics": statistics}
    flat = planned((16, 12)).model_dump(mode="json")
    changes = {
        "axis_order": [1, 2, 0],
        "channels": [first, {**first, "name": "T2", "use_mask": False}],
        "labels": {"names": {"background": 0, "both": [1, 2], "left": 1, "right": 2}, "region_order": [3, 1, 2]},
        "configurations": {
            "2d": flat | {"spacing": [1.0, 1.5], "network": flat["network"] | {"kind": "residual"}}
        },
    }  # fmt: skip
    settings = {"augmentation.mirror_swap": [["left", "right"]], "augmentation.mirror_axes": [0, 1]}
    folder = make_model(tmp_path / "model", "2d", changes, folds=2, settings=settings)
    assert list(export_onnx(folder, tmp_path / "out")) == ["fold_0.onnx", "fold_1.onnx"]
    model = load_fp32(folder)
    exported = runner.load_onnx(tmp_path / "out")
    assert exported.swap is not None and exported.swap.channels == (0, 2, 1) and len(exported.sessions) == 2
    array = np.random.default_rng(0).normal(size=(2, 30, 9, 25)).astype(np.float32)
    array[:, :3] = 0
    agree(model, exported, array, (1.0, 5.0, 1.2))
    prepared = preprocess_image(
        predictor.as_image(array, (1.0, 5.0, 1.2), model.plan), None, model.plan, model.configuration
    ).image
    expected = predict_preprocessed(model, prepared).numpy()
    np.testing.assert_allclose(exported.logits(prepared), expected, atol=1e-3, rtol=0)
    single = runner.load_onnx(tmp_path / "out", folds=[1]).logits(prepared)
    assert np.abs(single - expected).max() > 1e-2
    with pytest.raises(UserError, match="has no fold 7"):
        runner.load_onnx(tmp_path / "out", folds=[7])


@torch.no_grad()
def test_windows_of_zeros_are_background_as_with_torch(make_model: MakeModel, tmp_path: Path) -> None:
    """With normalisation inside a mask, air between two bodies is not computed."""
    statistics = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"), 1)
    channel = {"name": "T1", "normalization": "zscore", "use_mask": True, "statistics": statistics}
    changes = {"channels": [channel], "configurations": {"2d": planned((16, 12)).model_dump(mode="json")}}
    folder = make_model(tmp_path / "model", "2d", changes, settings={"augmentation.mirror_axes": []})
    file, network = folder / "fold_0" / MODEL, build_network(Plan.read(folder / "plans.json"), "2d")
    header = load_weights(file, network)
    network.heads[-1].get_parameter("bias")[1] += 0.5  # or nothing is found in air
    save_weights(file, network, header)
    export_onnx(folder, tmp_path / "out")
    array = np.random.default_rng(0).normal(size=(4, 70, 12)).astype(np.float32)
    array[:, 15:55] = 0
    spacing, exported = (1.0, *changes["configurations"]["2d"]["spacing"]), runner.load_onnx(tmp_path / "out")
    agree(load_fp32(folder), exported, array, spacing)
    assert (replace(exported, skip_empty=False)(array, spacing) != exported(array, spacing)).any(), "it counts"


@pytest.mark.slow
def test_a_cascade_takes_its_first_stage_along(make_model: MakeModel, tmp_path: Path) -> None:
    coarse = planned((8, 8, 8)).model_dump(mode="json") | {"spacing": [3.0, 3.0, 3.0]}
    fine = {**coarse, "spacing": [1.5, 1.5, 1.5], "previous_stage": "3d_lowres"}
    changes = {"configurations": {"3d_lowres": coarse, "3d_cascade_fullres": fine}}
    make_model(tmp_path / "first", "3d_lowres", changes)
    second = make_model(tmp_path / "second", "3d_cascade_fullres", changes, previous="first", settings={
        "augmentation.mirror_swap": [["Anterior", "Posterior"]]})  # fmt: skip
    differences = export_onnx(second, tmp_path / "out")
    assert list(differences) == ["fold_0.onnx", "previous/fold_0.onnx"]
    model = load_fp32(second)
    exported = runner.load_onnx(tmp_path / "out")
    assert exported.first_stage is not None and exported.swap is not None and exported.swap.table == (0, 2, 1, 3)
    array = np.random.default_rng(0).normal(size=(18, 21, 24)).astype(np.float32)
    agree(model, exported, array, (1.0, 1.1, 1.2))
    as_nnunet = replace(model, of_nnunet=True)
    expected, other = as_nnunet(array, (1.0, 1.1, 1.2)), exported(array, (1.0, 1.1, 1.2))
    found = replace(exported, of_nnunet=True)(array, (1.0, 1.1, 1.2))
    assert (found == expected).mean() > 0.999 > (other == expected).mean()
    classes = np.zeros((18, 21, 24), np.uint8)
    with_, without = (exported.logits(array[None], classes + value) for value in (1, 0))
    assert np.abs(with_ - without).max() > 1e-2, "the first stage counts"


def test_a_graph_that_computes_something_else_is_noticed(exported: Path, pair: Pair) -> None:
    other = build_network(pair[0].plan, pair[0].configuration_name).eval()
    window = torch.randn(1, 1, *pair[0].configuration.patch_size)
    with pytest.raises(RuntimeError, match=r"fold_0\.onnx differs from the network"):
        exporter._difference(other, window, exported / "fold_0.onnx")


def test_a_window_of_nothing_but_air_does_no_harm(tmp_path: Path) -> None:
    """onnxruntime's own instance norm is off by 0.1 there, and each layer makes it worse."""
    norm, air = nn.InstanceNorm3d(1, affine=True).requires_grad_(False), torch.full((1, 1, 64, 64, 64), -1.3)
    body = torch.cat([air[:, :, :48], torch.randn(1, 1, 16, 64, 64)], 2)
    stepwise = exporter._with_stepwise_norms(nn.Sequential(norm))
    exporter._write_graph(stepwise, torch.cat([air, body]), {}, tmp_path / "n.onnx")
    session = runner.start_session(tmp_path / "n.onnx")
    for x in (air, body, body + 100):
        expected = deepcopy(norm).double()(x.double()).numpy()
        np.testing.assert_allclose(session.run(None, {"image": x.numpy()})[0], expected, atol=3e-4, rtol=0)


class Loop(nn.Module):
    """Its course depends on its input, which no graph can say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


def test_what_cannot_be_exported_is_reported(
    tiny_model: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="exists already"):
        export_onnx(tiny_model, exported)
    with pytest.raises(UserError, match="cannot be written as ONNX"):
        exporter._write_graph(Loop(), torch.zeros(2, 1, 4, 4), {}, tmp_path / "loop.onnx")
    monkeypatch.setattr(exporter, "_NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"ONNX needs no_such_package.*pip install -e '\.\[onnx\]"):
        export_onnx(tiny_model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_none_is_refused(exported: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no exported model \(no onnx\.json\)"):
        runner.load_onnx(tiny_model)
    shutil.copytree(exported, tmp_path / "copy")
    file = tmp_path / "copy" / "fold_0.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"fold_0\.onnx: cannot be run by onnxruntime"):
        runner.load_onnx(tmp_path / "copy")
    edit(tmp_path / "copy" / "onnx.json", setting(format="nnlite-onnx-2"))
    with pytest.raises(UserError, match="has another format than nnlite-onnx-1"):
        runner.load_onnx(tmp_path / "copy")
