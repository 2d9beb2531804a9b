"""`nnlite view`: what the page shows, in a real browser, and what its server refuses."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image as Picture

import nnunet_lite
from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_geometry, read_label, write_label
from nnunet_lite.data.labels import ADDED, CONFUSED, MISSED, Labels, label_colours
from nnunet_lite.data.nifti import write_nifti
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import write_json
from nnunet_lite.reporting import viewer
from nnunet_lite.reporting.pictures import planes_of
from nnunet_lite.reporting.viewer import Scene, SceneLayer, View, open_at, read_case_scene, read_file_scene, serve

ANTERIOR, POSTERIOR = (np.array(colour) for colour in label_colours(2))
Answer = tuple[int, dict[str, str], bytes]


def ask(view: View, path: str | None = None, method: str = "GET", host: str | None = "127.0.0.1") -> Answer:
    """Send one request with exactly this path and Host."""
    parts = urlsplit(view.url)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=10)
    connection.putrequest(method, parts.path if path is None else path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


@pytest.fixture(scope="module")
def held_out(tiny_model: Path) -> str:
    """A case that fold 0 of the tiny model holds out."""
    return sorted(p.name.removesuffix(".nii.gz") for p in (tiny_model / "fold_0" / "validation").glob("*.nii.gz"))[0]


@pytest.fixture(scope="module")
def view(tiny_workspace: Path, held_out: str) -> Iterator[View]:
    with nnunet_lite.view(held_out, workspace=tiny_workspace, browser=False) as shown:
        yield shown


def read_json(view: View, name: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(ask(view, urlsplit(view.url).path + name)[2])
    return answer


def scene_of(view: View) -> dict[str, Any]:
    """What the page reads of the case that is opened first."""
    return read_json(view, f"{read_json(view, 'cases.json')['first']}/scene.json")


def layers_of(view: View) -> dict[str, str]:
    """Name of each layer -> the name of its voxels on the server."""
    first = read_json(view, "cases.json")["first"]
    return {layer["name"]: f"{first}/layer-{i}.nii" for i, layer in enumerate(scene_of(view)["layers"])}


def legend_of(view: View) -> list[str]:
    return [entry["name"] for entry in scene_of(view)["legend"]]


def volume(view: View, name: str) -> np.ndarray:
    """The voxels of a layer as a browser receives them, with axes to the right, front and head."""
    return upright(nibabel.Nifti1Image.from_bytes(ask(view, urlsplit(view.url).path + name)[2]))


def upright(image: Any) -> np.ndarray:
    return np.asarray(nibabel.as_closest_canonical(image).dataobj)


def serve_file(file: Path) -> View:
    return serve(lambda name: read_file_scene(Path(name), []), {str(file): None}, str(file))


def test_a_case_with_reference_and_prediction(view: View, held_out: str, hippocampus: Path, tiny_model: Path) -> None:
    layers = layers_of(view)
    assert list(layers) == ["MRI", "reference", "tiny, fold 0"]
    image, label, predicted = (
        upright(nibabel.load(folder / f"{held_out}.nii.gz"))
        for folder in (hippocampus / "imagesTr", hippocampus / "labelsTr", tiny_model / "fold_0" / "validation")
    )
    assert np.array_equal(volume(view, layers["MRI"]), image)
    assert np.array_equal(volume(view, layers["reference"]), label)
    assert np.array_equal(volume(view, layers["tiny, fold 0"]), predicted)
    scene = scene_of(view)
    assert legend_of(view) == ["Anterior", "Posterior"] and scene["compared"] and scene["ignore"] is None
    low, high = scene["layers"][0]["window"]
    assert image.min() <= low < high <= image.max()


def test_what_is_served(view: View) -> None:
    root = urlsplit(view.url).path
    assert re.fullmatch(r"/[\w-]{32}/", root)
    scripts = ("viewer.js", "planes.js", "slices.js", "solid.js", "niivue.js")
    for name in ("", *scripts, "viewer.css", "cases.json", "0/scene.json", "9/scene.json", *layers_of(view).values()):
        status, headers, body = ask(view, root + name)
        assert (status, int(headers["Content-Length"])) == (200, len(body)), name
        assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert ask(view, root + name, "HEAD")[::2] == (200, b"")
    assert ask(view, host="localhost:8000")[0] == 200, "a tunnel through ssh may change the port"
    assert "Access-Control-Allow-Origin" not in headers


OTHER_PATHS = """
/ * {token} /{token} /{token}/0/layer-4.nii /{token}/0/layer-0.nii?x=1 /{token}//cases.json /{token}/./cases.json
/{token}/../{token}/cases.json /{token}/%63ases.json /{token}/10/scene.json /{token}/-1/scene.json
/{token}/0/../cases.json /{token}/0 /{token}/0/ /{token}/0/viewer.js /{token}/scene.json /{token}/0/0/scene.json
/{token}/viewer.py /{token}/../viewer.py /{token}//etc/passwd
/{token}/../../../../../../../../etc/passwd /{token}/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd /etc/passwd
/{token}/..\\..\\..\\etc\\passwd /wrong-token-wrong-token-wrong-to/cases.json /{upper}/cases.json
http://127.0.0.1/{token}/cases.json /{token}/niivue.LICENSE.txt
"""


@pytest.mark.parametrize("path", ["", *OTHER_PATHS.split()])
def test_other_paths_are_refused(view: View, path: str) -> None:
    token = urlsplit(view.url).path.strip("/")
    status, _, body = ask(view, path.format(token=token, upper=token.swapcase()))
    assert status in (400, 404) and b"root:" not in body and token.encode() not in body


def test_the_address_that_starts_the_browser_works_once(view: View) -> None:
    """All users of the machine can read how a program was started."""
    once = view.one_time_url()
    path = urlsplit(once).path
    assert once.startswith(f"http://127.0.0.1:{urlsplit(view.url).port}/") and path not in view.url
    assert ask(view, path, "HEAD")[0] == 404 and ask(view, path, host="evil.example")[0] == 421
    status, headers, body = ask(view, path)
    assert (status, headers["Location"], body) == (303, view.url, b"")
    assert ask(view, path)[0] == 404


OTHER_HOSTS = (None, "", "evil.example", "127.0.0.1.evil.example", "evil.example:80", "[::1]")
OTHER_METHODS = ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get")


@pytest.mark.parametrize(
    ("options", "statuses"),
    [*(({"host": host}, (421,)) for host in OTHER_HOSTS), *(({"method": m}, (405, 501)) for m in OTHER_METHODS)],
    ids=str,
)
def test_other_hosts_and_methods_are_refused(view: View, options: dict[str, Any], statuses: tuple[int, ...]) -> None:
    """A page whose name an attacker makes point here (DNS rebinding) sends that name as its host."""
    status, _, body = ask(view, **options)
    assert status in statuses and b"viewer.js" not in body


def test_two_hosts_are_refused(view: View) -> None:
    parts = urlsplit(view.url)
    assert view.server.socket.getsockname()[0] == parts.hostname == "127.0.0.1", "only this machine can open it"
    with socket.create_connection(("127.0.0.1", parts.port or 0), timeout=10) as connection:
        hosts = "Host: 127.0.0.1\r\nHost: evil.example\r\n"
        connection.sendall(f"GET {parts.path} HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode())
        assert connection.makefile("rb").readline().split()[1] == b"421"


def test_nothing_is_served_after_close(hippocampus: Path) -> None:
    file = sorted((hippocampus / "imagesTs").iterdir())[0]
    with serve_file(file) as first, serve_file(file) as second:
        assert ask(first)[0] == 200
        assert urlsplit(first.url).port != urlsplit(second.url).port
        assert ask(second, urlsplit(first.url).path)[0] == 404, "one viewer's token opens no other"
    with pytest.raises(OSError):
        ask(first)


def test_which_models(tiny_workspace: Path, tiny_model: Path, held_out: str, tmp_path: Path) -> None:
    with nnunet_lite.view(held_out, model="tiny", workspace=tiny_workspace, browser=False) as shown:
        assert "tiny, fold 0" in layers_of(shown)
    learnt = json.loads((tiny_model.parent.parent / "splits.json").read_text())[0]["train"][0]
    with nnunet_lite.view(learnt, workspace=tiny_workspace, browser=False) as shown:
        assert list(layers_of(shown)) == ["MRI", "reference"], "no prediction of a case that was trained on"
    with nnunet_lite.view(learnt, model=str(tiny_model), workspace=tiny_workspace, browser=False) as shown:
        assert str(tiny_model) in layers_of(shown), "a path is of a model that predicts now"
    with pytest.raises(UserError, match=f"tiny: has not predicted {learnt}: the fold that holds it out is not trained"):
        nnunet_lite.view(learnt, model="tiny", workspace=tiny_workspace, browser=False)
    with pytest.raises(UserError, match=r"tinier: is no model folder .* The models in .* are tiny\."):
        nnunet_lite.view(learnt, model="tinier", workspace=tiny_workspace, browser=False)
    with pytest.raises(UserError, match=rf"no case of that name in Task04_Hippocampus. Did you mean .*{learnt}"):
        nnunet_lite.view(learnt[:-1], workspace=tiny_workspace, browser=False)


def test_what_was_selected_is_shown(tiny_workspace: Path, tiny_model: Path, held_out: str, tmp_path: Path) -> None:
    """inference.json of `nnlite select` names one model, or two, whose ensemble is next to the models."""
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("preprocessed"))
    root = workspace / "Task04_Hippocampus"
    shutil.copytree(root / "models" / "tiny", root / "models" / "other")
    shutil.copytree(tiny_model / "fold_0", root / "ensembles" / "other+tiny" / "fold_0")
    for models in (["other"], ["other", "tiny"]):
        write_json(root / "inference.json", {
            "format": "nnlite-inference-1", "models": models, "folds": ["0"], "postprocessing": {},
            "postprocessing_gain": {}, "candidates": [], "made": "2026-11-26", "version": "0.1.0",
        })  # fmt: skip
        with nnunet_lite.view(held_out, workspace=workspace, browser=False) as shown:
            assert f"{'+'.join(models)}, fold 0" in layers_of(shown)
    write_json(root / "inference.json", {})
    with pytest.raises(UserError, match=r"inference\.json: is no selection .* Run `nnlite select` again\."):
        nnunet_lite.view(held_out, workspace=workspace, browser=False)


def test_files_of_any_format(tmp_path: Path) -> None:
    """A colour picture, a mask of 0 and 255, several channels in a file: the browser receives NIfTI."""
    rgb = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:9, 3:20] = 255
    Picture.fromarray(rgb).save(tmp_path / "cell.png")
    Picture.fromarray(mask).save(tmp_path / "mask.png")
    scene = read_file_scene(tmp_path / "cell.png", [])
    assert open_at(scene, (7, 9)).at == open_at(scene, (0, 7, 9)).at
    for voxel in ((9,), (9999, 0), (0, 0, 0, 0)):
        with pytest.raises(UserError, match=r"cell.png has no voxel .*Give z from 0 to 0, y to"):
            open_at(scene, voxel)
    with nnunet_lite.view(tmp_path / "cell.png", tmp_path / "mask.png", browser=False) as shown:
        layers = layers_of(shown)
        pixels = volume(shown, layers["colours"])[::-1, ::-1, 0].T
        assert np.array_equal(np.stack([pixels[c] for c in "RGB"], -1), rgb)
        assert np.array_equal(volume(shown, layers["mask.png"])[::-1, ::-1, 0].T, mask // 255)
        assert legend_of(shown) == ["label 255"] and [p["name"] for p in scene_of(shown)["planes"]] == ["xy"]
    channels = np.random.default_rng(2).normal(size=(6, 5, 4, 2))
    channels[0, 0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(channels, np.diag([1, 2, 3, 1])), tmp_path / "two.nii.gz")
    scene = read_file_scene(tmp_path / "two.nii.gz", [])
    assert [layer.name for layer in scene.layers] == ["channel 0", "channel 1"]
    first, second = (nibabel.Nifti1Image.from_bytes(layer.nifti(scene.geometry)) for layer in scene.layers)
    assert np.isfinite(first.dataobj).all() and np.allclose(upright(second), channels[..., 1], atol=1e-6)
    assert np.allclose(nibabel.as_closest_canonical(first).affine, np.diag([1, 2, 3, 1]))


def test_labels_of_files(tmp_path: Path, hippocampus: Path, tiny_workspace: Path) -> None:
    image = sorted((hippocampus / "imagesTr").iterdir())[0]
    label = hippocampus / "labelsTr" / image.name
    with nnunet_lite.view(image, label, dataset="Task04", workspace=tiny_workspace, browser=False) as shown:
        assert legend_of(shown) == ["Anterior", "Posterior"]
    with nnunet_lite.view(image, label, browser=False) as shown:
        assert legend_of(shown) == ["Anterior", "Posterior"], "as the dataset.json beside it names them"
        assert list(layers_of(shown))[1] == f"labelsTr/{image.name}", "not that of the image"
    predicted = tmp_path / "predicted" / image.name
    predicted.parent.mkdir()
    shutil.copy(label, predicted)
    record = {"runs": [{"labels": {"background": 0, "head": 1, "body": 2}}]}
    write_json(predicted.parent / "predictions.json", record)
    assert [name for name, _ in read_file_scene(image, [predicted]).legend] == ["head", "body"]
    geometry = read_geometry(label)[0]
    strange = tmp_path / image.name
    write_label(strange, np.full(geometry.shape, 7, np.uint8), geometry)
    with pytest.raises(UserError, match=r"label values 7\.\.7 are not all among \[0, 1, 2\]"):
        nnunet_lite.view(image, [label, strange], dataset="Task04", workspace=tiny_workspace, browser=False)
    assert [layer.name for layer in read_file_scene(image, [label, strange]).layers[1:]] == [
        f"labelsTr/{image.name}", f"{tmp_path.name}/{image.name}"
    ]  # fmt: skip
    many = np.arange(2000).reshape(10, 10, 20)
    write_label(tmp_path / "many.nii.gz", many, Geometry(many.shape, (1.0, 1.0, 1.0)))
    with pytest.raises(UserError, match="are too many for label maps"):
        read_file_scene(image, [tmp_path / "many.nii.gz"])
    with nnunet_lite.view(image, model="tiny", workspace=tiny_workspace, browser=False) as shown:
        assert legend_of(shown) == ["Anterior", "Posterior"] and list(layers_of(shown)) == ["channel 0", "tiny"]
    regions = Labels(
        names={"background": 0, "whole": (1, 2), "core": (2,), "edge": 3}, ignore=4, region_order=(1, 2, 3)
    )
    legend = read_file_scene(image, [label], regions).legend
    assert [name for name, _ in legend] == ["whole", "whole + core", "edge", "ignore"]
    assert len(set(label_colours(40))) == 40


def test_a_mask_of_0_and_255_is_shown_with_the_labels_of_a_model(tmp_path: Path) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[2:5, 4:9] = 255
    Picture.fromarray(mask).save(tmp_path / "mask.png")
    labels = Labels(names={"background": 0, "cell": 1})
    scene = read_file_scene(tmp_path / "mask.png", [tmp_path / "mask.png"], labels)
    shown = scene.layers[1].read()
    assert set(np.unique(shown)) == {0, 1} and shown.sum() == 15
    Picture.fromarray(mask // 255 * 7).save(tmp_path / "seven.png")
    with pytest.raises(UserError, match=r"seven\.png: label values 0\.\.7 are not all among \[0, 1\]\. Give its"):
        read_file_scene(tmp_path / "mask.png", [tmp_path / "seven.png"], labels)


def test_the_worst_case_comes_first(view: View, tiny_workspace: Path, tiny_model: Path, held_out: str) -> None:
    listed = read_json(view, "cases.json")
    rows = json.loads((tiny_model / "fold_0" / "validation" / "summary.json").read_text())["metric_per_case"]
    dice = {row["case"]: np.mean([values["Dice"] for values in row["metrics"].values()]) for row in rows}
    scored = {case: score for case, score in listed["cases"] if score is not None}
    assert scored == pytest.approx(dice) and len(listed["cases"]) == 10
    assert (
        list(scored.values()) == sorted(scored.values())
        and list(scored) == [c for c, _ in listed["cases"]][: len(dice)]
    )
    assert listed["cases"][listed["first"]][0] == held_out
    with nnunet_lite.view(workspace=tiny_workspace, browser=False) as shown:
        assert read_json(shown, "cases.json")["first"] == 0 and shown.title.startswith(next(iter(scored)))
    summary = tiny_model / "fold_0" / "validation" / "summary.json"
    kept = summary.read_text()
    try:
        summary.write_text("{}")
        with nnunet_lite.view(held_out, model="tiny", workspace=tiny_workspace, browser=False) as shown:
            assert all(score is None for _, score in read_json(shown, "cases.json")["cases"])
    finally:
        summary.write_text(kept)


def test_a_case_that_cannot_be_read_says_so_on_the_page(hippocampus: Path, tmp_path: Path) -> None:
    good, bad = sorted((hippocampus / "imagesTs").iterdir())[0], tmp_path / "bad.nii.gz"
    bad.write_bytes(b"nothing")
    files = {str(good): None, str(bad): None}
    with serve(lambda name: read_file_scene(Path(name), []), files, str(good)) as shown:
        assert "bad.nii.gz" in read_json(shown, "1/scene.json")["problem"]
        assert ask(shown, urlsplit(shown.url).path + "1/layer-0.nii")[0] == 404
        assert read_json(shown, "0/scene.json")["title"] == good.name
    with pytest.raises(UserError, match=r"bad\.nii\.gz"):
        serve(lambda name: read_file_scene(Path(name), []), files, str(bad))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error", "lost.nii.gz"), MemoryError()])
def test_a_disk_or_memory_that_fails_is_said_on_the_page(tmp_path: Path, capfd: Any, error: Exception) -> None:
    Picture.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")

    def read(name: str) -> Scene:
        if name == "b":
            raise error
        return read_file_scene(tmp_path / "a.png", [])

    with serve(read, {"a": None, "b": None}, "a") as shown:
        assert read_json(shown, "1/scene.json")["problem"] == describe(error)
        assert ask(shown, urlsplit(shown.url).path + "1/layer-0.nii")[0] == 404
    said = capfd.readouterr().err
    assert describe(error) in said and "Traceback" not in said


def test_a_slow_browser_receives_all_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is of a piece: a layer may take longer."""
    monkeypatch.setattr(viewer._Handler, "timeout", 1)
    geometry = Geometry((20, 1024, 1024), (1.0, 1.0, 1.0))
    layer = SceneLayer("image", "image", lambda: np.zeros(geometry.shape, np.uint8), (0.0, 1.0))
    scene = Scene("large", (layer,), (), geometry, (0, 0, 0), False, None)
    with serve(lambda _: scene, {"large": None}, "large") as shown, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", urlsplit(shown.url).port))
        request = (
            f"GET {urlsplit(shown.url).path}0/layer-0.nii HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(request.encode())
        received, stream = 0, connection.makefile("rb")
        while piece := stream.read(1 << 20):
            received += len(piece)
            time.sleep(0.1)
    assert received > np.prod(geometry.shape)


def test_it_opens_where_most_is_wrong(tmp_path: Path, hippocampus: Path) -> None:
    dataset = read_dataset(hippocampus)
    case = dataset.cases[0]
    label, geometry, _ = read_label(case.label or "")
    predicted = np.roll(np.where(label == 1, 2, label), 3, axis=1).astype(np.uint8)
    write_label(tmp_path / "predicted.nii.gz", predicted, geometry)
    scene = read_case_scene(dataset, case, [("mine", tmp_path / "predicted.nii.gz")])
    assert [layer.name for layer in scene.layers] == ["MRI", "reference", "mine"] and scene.has_reference
    turn, _ = planes_of(geometry)
    wrong = turn.apply(label != predicted)
    assert scene.at == tuple(int(wrong.sum(axis=axes).argmax()) for axes in ((1, 2), (0, 2), (0, 1)))
    alone = read_file_scene(Path(case.images[0]), [tmp_path / "predicted.nii.gz"])
    assert not alone.has_reference and turn.apply(predicted)[alone.at[0]].any()


def test_a_label_map_on_another_grid_is_shown_where_its_header_says(tmp_path: Path, capfd: Any) -> None:
    image, coarse = np.zeros((12, 10, 8), np.int16), np.zeros((6, 5, 4), np.uint8)
    coarse[1:3, 2:4, 1] = 1
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii.gz")
    affine = np.diag([2, 2, 2, 1.0])
    affine[:3, 3] = 0.5  # the corners of both grids are in the same place
    nibabel.save(nibabel.Nifti1Image(coarse, affine), tmp_path / "label.nii.gz")
    scene = read_file_scene(tmp_path / "image.nii.gz", [tmp_path / "label.nii.gz"])
    assert "its shape" in capfd.readouterr().err
    shown = scene.layers[1].read().transpose(2, 1, 0)
    assert np.array_equal(shown, coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2))


def test_saved_probabilities_are_maps(tmp_path: Path) -> None:
    """Entropy is 1 where all labels are as likely, and 0 where one is certain; maps of a case "a_b" are not of "a"."""
    geometry = Geometry((4, 5, 6), (1.0, 1.0, 1.0))
    shares = np.zeros((3, 4, 5, 6))
    shares[:] = 1 / 3
    shares[:, 0] = [[[1]], [[0]], [[0]]]
    (tmp_path / "probabilities").mkdir()
    for name in ("a", "a_b"):
        write_label(tmp_path / f"{name}.nii.gz", np.zeros((4, 5, 6), np.uint8), geometry)
        for label, share in zip(("background", "liver", "left kidney"), shares, strict=True):
            file = tmp_path / "probabilities" / f"{name}_{label.replace(' ', '_')}.nii.gz"
            write_nifti(file, np.rint(share * 255).astype(np.uint8), geometry, 1 / 255)
    scene = read_file_scene(tmp_path / "a.nii.gz", [tmp_path / "a.nii.gz"])
    maps = {layer.name: layer.read() for layer in scene.layers if layer.kind == "map"}
    probabilities = [f"probability of {name}" for name in ("background", "left_kidney", "liver")]
    assert list(maps) == ["uncertainty (entropy)", *probabilities]
    assert (maps["probability of liver"][1:] == 85).all() and (maps["probability of background"][0] == 255).all()
    entropy = maps["uncertainty (entropy)"]
    assert entropy.dtype == np.uint8 and (entropy[0] == 0).all() and (entropy[1:] >= 254).all()
    (tmp_path / "probabilities" / "a_background.nii.gz").unlink()  # then each label is compared with the rest
    scene = read_file_scene(tmp_path / "a.nii.gz", [tmp_path / "a.nii.gz"])
    rest = next(layer for layer in scene.layers if layer.name == "uncertainty (entropy)").read()
    assert (rest[1:] == round(255 * 0.918)).all()
    (tmp_path / "uncertainty").mkdir()
    write_nifti(tmp_path / "uncertainty" / "a_entropy.nii.gz", np.full((4, 5, 6), 51, np.uint8), geometry, 1 / 255)
    scene = read_file_scene(tmp_path / "a.nii.gz", [tmp_path / "a.nii.gz"])
    stored = next(layer for layer in scene.layers if layer.name == "uncertainty (entropy)")
    assert (stored.read() == 51).all()
    SimpleITK.WriteImage(SimpleITK.ReadImage(tmp_path / "a.nii.gz"), tmp_path / "a.seg.nrrd")
    scene = read_file_scene(tmp_path / "a.nii.gz", [tmp_path / "a.seg.nrrd"])
    assert "uncertainty (entropy)" in [layer.name for layer in scene.layers]


def test_a_large_image_has_a_coarse_copy(tmp_path: Path) -> None:
    voxels = np.random.default_rng(3).integers(0, 99, (300, 130, 60), np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1, 2, 3, 1])), tmp_path / "large.nii.gz")
    with serve_file(tmp_path / "large.nii.gz") as shown:
        scene = scene_of(shown)
        assert (scene["shape"], scene["coarse"], scene["fine"]) == ([60, 130, 300], [1, 2, 3], [1, 1, 1])
        copy = nibabel.Nifti1Image.from_bytes(ask(shown, urlsplit(shown.url).path + "0/layer-0-coarse.nii")[2])
        assert np.allclose(np.abs(np.diag(copy.affine)[:3]), [3, 4, 3])
        assert np.array_equal(np.asarray(copy.dataobj), voxels[::-3, ::-2])
        assert np.array_equal(volume(shown, "0/layer-0.nii"), voxels)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_the_address_and_ends_with_a_signal(
    tiny_workspace: Path, held_out: str, number: signal.Signals
) -> None:
    command = [str(Path(sysconfig.get_path("scripts")) / "nnlite"), "view", held_out, "--no-browser"]
    with subprocess.Popen([*command, "-w", str(tiny_workspace)], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", url)
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port, timeout=10)
        connection.request("GET", urlsplit(url).path)
        assert b"viewer.js" in connection.getresponse().read()
        connection.close()
        process.send_signal(number)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and err.endswith("closed\n") and "Traceback" not in err, err


def test_mistakes_are_reported_in_one_line(command: Callable[..., tuple[int, str, str]], tiny_workspace: Path) -> None:
    code, out, err = command("view", "nowhere.nii.gz", "-w", tiny_workspace, cwd=tiny_workspace)
    assert (code, out) == (2, "") and "error: there is no file nowhere.nii.gz, and no case of that name" in err
    code, out, err = command("view", "nowhere.nii.gz", "label.nii.gz", cwd=tiny_workspace)
    assert (code, out) == (2, "") and err.startswith("error: nowhere.nii.gz: ")


def test_in_a_browser(view: View, browser: Any) -> None:
    """Fills, outlines and errors are drawn in their colours; keys and clicks change it; the console stays silent."""
    problems: list[str] = []
    ours = (f"http://127.0.0.1:{urlsplit(view.url).port}/", "data:")
    page = browser.new_page(viewport={"width": 760, "height": 400})
    page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith(ours) else problems.append(sent.url))
    page.goto(view.one_time_url())
    page.wait_for_selector("html[data-solid]", timeout=120_000)
    solid = _pixels(page, "#solid canvas")
    assert (np.ptp(solid, axis=-1) > 40).mean() > 0.005, "labels in three dimensions"
    pixels = _pixels(page)
    grey = (np.ptp(pixels, axis=-1) < 12) & (pixels.max(-1) > 30)
    assert grey.mean() > 0.03 and len(np.unique(pixels[grey].max(-1))) > 20, "the image, in many greys"
    assert page.inner_text("#key") == "reference (filled)\ntiny, fold 0 (outline)"
    page.keyboard.press("2")
    page.locator("#segmentations input[type=range]").fill("1")
    only_reference = _pixels(page)
    assert all(_share(only_reference, colour) > 0.002 for colour in (ANTERIOR, POSTERIOR)), "the reference's labels"
    page.keyboard.press("o")
    outlined = _pixels(page)
    assert 0 < _share(outlined, POSTERIOR) < _share(only_reference, POSTERIOR) / 2, "a key outlines them"
    page.keyboard.press("o")
    page.click("#labels button >> text=Anterior")
    without = _pixels(page)
    assert _share(without, ANTERIOR) == 0 and _share(without, POSTERIOR) > 0.002, "a click hides one label"
    page.keyboard.press("1")
    assert _share(_pixels(page), POSTERIOR) == 0, "a key hides the segmentation"
    page.locator("#views input").nth(1).check()
    assert (_pixels(page).max(-1) > 30).mean() > 0.03, "the axial plane alone"
    before, box = _voxel(page), page.locator("#planes").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2 + 50, box["y"] + box["height"] / 2 + 35)
    assert [now != then for now, then in zip(_voxel(page), before, strict=True)] == [False, True, True]
    page.mouse.wheel(0, 100)
    page.wait_for_function("(z) => !document.querySelector('#place').textContent.includes(`: ${z} `)", arg=before[0])
    first = page.inner_text("#title")
    page.keyboard.press("n")
    page.wait_for_function("(title) => document.querySelector('#title').textContent !== title", arg=first)
    page.wait_for_selector("html[data-ready=full]")
    assert not page.is_checked("#segmentations input >> nth=0"), "the next case is shown in the same way"
    page.close()
    assert problems == []


def test_a_layer_that_was_cut_off_is_read_again(browser: Any, tmp_path: Path) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:9, 3:20] = 255
    Picture.fromarray(mask).save(tmp_path / "mask.png")
    with serve(lambda _: read_file_scene(tmp_path / "mask.png", [tmp_path / "mask.png"]), {"a": None}, "a") as shown:
        page = browser.new_page()
        page.route("**/layer-1.nii", lambda route: route.abort(), times=1)
        page.goto(shown.url)
        page.wait_for_selector("#problem:visible", timeout=120_000)
        page.keyboard.press("1")
        page.wait_for_selector("html[data-ready=full]")
        assert page.is_hidden("#problem")
        page.close()


def test_errors_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """Missed, added and confused voxels have their colours; what is ignored has none."""
    reference, predicted = np.zeros((2, 40, 40), np.uint8)
    reference[:10, :20], reference[10:20, :20], reference[30:, :] = 1, 2, 3  # the last is ignored
    predicted[:10, :10], predicted[10:20, :20], predicted[:10, 30:], predicted[30:, :20] = 1, 1, 2, 1
    geometry = Geometry((1, 40, 40), (999.0, 1.0, 1.0), dimensions=2)
    for name, voxels in (("image", predicted * 0), ("reference", reference), ("predicted", predicted)):
        write_label(tmp_path / f"{name}.png", voxels[None], geometry)
    labels = Labels(names={"background": 0, "a": 1, "b": 2}, ignore=3)
    scene = read_file_scene(tmp_path / "image.png", [tmp_path / "reference.png", tmp_path / "predicted.png"], labels)
    assert scene.ignore == 3 and scene.at[1] < 30, "it does not open where nothing is annotated"
    with serve(lambda _: scene, {"image": None}, "image") as shown:
        page = browser.new_page(viewport={"width": 800, "height": 460})
        page.goto(shown.url)
        page.wait_for_selector("html[data-ready=full]", timeout=120_000)
        for key in "12ec":  # errors alone, without the cross
            page.keyboard.press(key)
        pixels = _pixels(page)
        assert page.inner_text("#key").split() == ["missed", "added", "another", "label"]
        page.close()
    side = min(pixels.shape[:2])
    found = {name: _share(pixels, 0.85 * np.array(c)) for name, c in zip("mac", (MISSED, ADDED, CONFUSED), strict=True)}
    whole = side * side / (pixels.shape[0] * pixels.shape[1])
    assert found == pytest.approx({"m": whole / 16, "a": whole / 16, "c": whole / 8}, rel=0.1)


def _voxel(page: Any) -> list[int]:
    """The voxel of the cross, as the page shows it and `--at` takes it."""
    match = re.match(r"voxel z y x: (\d+) (\d+) (\d+)\s+·\s+MRI \d+", page.inner_text("#place"))
    assert match
    return [int(n) for n in match.groups()]


def _pixels(page: Any, selector: str = "#planes") -> np.ndarray:
    """What a canvas shows (height, width, 3), as integers."""
    shot = page.locator(selector).screenshot(timeout=120_000)
    return np.asarray(Picture.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def _share(pixels: np.ndarray, colour: np.ndarray) -> float:
    return float((np.abs(pixels - colour).max(axis=-1) <= 3).mean())
