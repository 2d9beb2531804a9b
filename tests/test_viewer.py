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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nibabel
import numpy as np
import pytest
from PIL import Image as Picture

import nnunet_lite
from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_geometry, read_label, write_label
from nnunet_lite.data.labels import Labels, label_colours
from nnunet_lite.errors import UserError
from nnunet_lite.files import write_json
from nnunet_lite.reporting.viewer import View, read_case_scene, read_file_scene, serve

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


def layers_of(view: View) -> dict[str, dict[str, Any]]:
    root = urlsplit(view.url).path
    return {layer["name"]: layer for layer in json.loads(ask(view, f"{root}scene.json")[2])["layers"]}


def volume(view: View, layer: dict[str, Any]) -> np.ndarray:
    """The voxels (x, y, z) of a layer as a browser receives them."""
    contents = ask(view, urlsplit(view.url).path + layer["url"])[2]
    return np.asarray(nibabel.Nifti1Image.from_bytes(contents).dataobj)


def test_a_case_with_reference_and_prediction(view: View, held_out: str, hippocampus: Path, tiny_model: Path) -> None:
    layers = layers_of(view)
    assert list(layers) == ["MRI", "reference", "tiny, fold 0", "errors of tiny, fold 0"]
    image, label, predicted = (
        np.asarray(nibabel.load(folder / f"{held_out}.nii.gz").dataobj)
        for folder in (hippocampus / "imagesTr", hippocampus / "labelsTr", tiny_model / "fold_0" / "validation")
    )
    assert np.array_equal(volume(view, layers["MRI"]), image)
    assert np.array_equal(volume(view, layers["reference"]), label)
    assert np.array_equal(volume(view, layers["tiny, fold 0"]), predicted)
    assert [entry["name"] for entry in layers["reference"]["legend"]] == ["Anterior", "Posterior"]
    low, high = layers["MRI"]["window"]
    assert image.min() <= low < high <= image.max()


def test_what_is_served(view: View) -> None:
    root = urlsplit(view.url).path
    assert re.fullmatch(r"/[\w-]{32}/", root)
    for name in ("", "viewer.js", "viewer.css", "niivue.js", "scene.json", "layer-0.nii", "layer-3.nii"):
        status, headers, body = ask(view, root + name)
        assert (status, int(headers["Content-Length"])) == (200, len(body)), name
        assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert ask(view, root + name, "HEAD")[::2] == (200, b"")
    assert ask(view, host="localhost:8000")[0] == 200, "a tunnel through ssh may change the port"
    assert "Access-Control-Allow-Origin" not in headers


OTHER_PATHS = """
/ * {token} /{token} /{token}/layer-4.nii /{token}/layer-0.nii?x=1 /{token}//scene.json /{token}/./scene.json
/{token}/../{token}/scene.json /{token}/%73cene.json /{token}/viewer.py /{token}/../viewer.py /{token}//etc/passwd
/{token}/../../../../../../../../etc/passwd /{token}/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd /etc/passwd
/{token}/..\\..\\..\\etc\\passwd /wrong-token-wrong-token-wrong-to/scene.json /{upper}/scene.json
http://127.0.0.1/{token}/scene.json /{token}/niivue.LICENSE.txt
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
    with serve(read_file_scene(file, [])) as first, serve(read_file_scene(file, [])) as second:
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
        write_json(root / "inference.json", {"format": "nnlite-inference-1", "models": models, "folds": ["0"]})
        with nnunet_lite.view(held_out, workspace=workspace, browser=False) as shown:
            assert f"{'+'.join(models)}, fold 0" in layers_of(shown)


def test_files_of_any_format(tmp_path: Path) -> None:
    """A colour picture, a mask of 0 and 255, several channels in a file: the browser receives NIfTI."""
    rgb = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:9, 3:20] = 255
    Picture.fromarray(rgb).save(tmp_path / "cell.png")
    Picture.fromarray(mask).save(tmp_path / "mask.png")
    with nnunet_lite.view(tmp_path / "cell.png", tmp_path / "mask.png", browser=False) as shown:
        layers = layers_of(shown)
        pixels = volume(shown, layers["colours"])[:, :, 0].T
        assert np.array_equal(np.stack([pixels[c] for c in "RGB"], -1), rgb)
        assert np.array_equal(volume(shown, layers["mask.png"])[:, :, 0].T, mask // 255)
        assert [entry["name"] for entry in layers["mask.png"]["legend"]] == ["label 255"]
    channels = np.random.default_rng(2).normal(size=(6, 5, 4, 2))
    channels[0, 0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(channels, np.diag([1, 2, 3, 1])), tmp_path / "two.nii.gz")
    scene = read_file_scene(tmp_path / "two.nii.gz", [])
    assert [(layer.name, layer.shown) for layer in scene.layers] == [("channel 0", True), ("channel 1", False)]
    first, second = (nibabel.Nifti1Image.from_bytes(layer.nifti) for layer in scene.layers)
    assert np.isfinite(first.dataobj).all() and np.allclose(second.dataobj, channels[..., 1], atol=1e-6)
    assert np.allclose(first.affine, np.diag([1, 2, 3, 1]))
    assert np.allclose(np.array(scene.to_voxel)[:, :3], np.diag([1, 1 / 2, 1 / 3]), atol=1e-6)


def test_labels_of_files(tmp_path: Path, hippocampus: Path, tiny_workspace: Path) -> None:
    image = sorted((hippocampus / "imagesTr").iterdir())[0]
    label = hippocampus / "labelsTr" / image.name
    with nnunet_lite.view(image, label, dataset="Task04", workspace=tiny_workspace, browser=False) as shown:
        assert [entry["name"] for entry in layers_of(shown)[image.name]["legend"]] == ["Anterior", "Posterior"]
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
        assert [entry["name"] for entry in layers_of(shown)["tiny"]["legend"]] == ["Anterior", "Posterior"]
    regions = Labels(
        names={"background": 0, "whole": (1, 2), "core": (2,), "edge": 3}, ignore=4, region_order=(1, 2, 3)
    )
    legend = read_file_scene(image, [label], regions).layers[1].legend
    assert [name for name, _ in legend] == ["whole", "whole + core", "edge", "ignore"]
    assert len(set(label_colours(40))) == 40


def test_a_mask_of_0_and_255_is_shown_with_the_labels_of_a_model(tmp_path: Path) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[2:5, 4:9] = 255
    Picture.fromarray(mask).save(tmp_path / "mask.png")
    labels = Labels(names={"background": 0, "cell": 1})
    scene = read_file_scene(tmp_path / "mask.png", [tmp_path / "mask.png"], labels)
    shown = np.asarray(nibabel.Nifti1Image.from_bytes(scene.layers[1].nifti).dataobj)
    assert set(np.unique(shown)) == {0, 1} and shown.sum() == 15
    Picture.fromarray(mask // 255 * 7).save(tmp_path / "seven.png")
    with pytest.raises(UserError, match=r"seven\.png: label values 0\.\.7 are not all among \[0, 1\]\. Give its"):
        read_file_scene(tmp_path / "mask.png", [tmp_path / "seven.png"], labels)


def test_the_colours_of_the_report() -> None:
    """The pictures of the report have the colours that the viewer and files with colours have."""
    css = (Path(nnunet_lite.__file__).parent / "reporting" / "templates" / "report.css").read_text()
    on_pictures = css[css.index(".swatch-on-picture {") :]
    found = re.findall(r"--c\d: #(\w{6})", on_pictures)
    assert found == [bytes(colour).hex() for colour in label_colours(10)]


def test_errors_by_kind(tmp_path: Path, hippocampus: Path) -> None:
    dataset = read_dataset(hippocampus)
    case = dataset.cases[0]
    label, geometry, _ = read_label(case.label or "")
    predicted = np.roll(np.where(label == 1, 2, label), 3, axis=1).astype(np.uint8)
    write_label(tmp_path / "predicted.nii.gz", predicted, geometry)
    scene = read_case_scene(dataset, case, [("mine", tmp_path / "predicted.nii.gz")])
    assert [layer.name for layer in scene.layers] == ["MRI", "reference", "mine", "errors of mine"]
    errors = np.asarray(nibabel.Nifti1Image.from_bytes(scene.layers[-1].nifti).dataobj).transpose(2, 1, 0)
    kinds = {"missed": (label > 0) & (predicted == 0), "added": (label == 0) & (predicted > 0)}
    kinds["another label"] = (label > 0) & (predicted > 0) & (label != predicted)
    assert [name for name, _ in scene.layers[-1].legend] == list(kinds)
    for value, where in enumerate(kinds.values(), 1):
        assert where.any() and np.array_equal(errors == value, where)


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
    """The canvas shows the volume and its labels; a key and a click hide them; the console stays silent."""
    problems: list[str] = []
    ours = (f"http://127.0.0.1:{urlsplit(view.url).port}/", "data:")
    page = browser.new_page(viewport={"width": 760, "height": 320})
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith(ours) else problems.append(sent.url))
    page.goto(view.one_time_url())
    page.wait_for_selector("html[data-ready]", timeout=120_000)
    pixels = _pixels(page)
    grey = (np.ptp(pixels, axis=-1) < 12) & (pixels.max(-1) > 30)
    assert grey.mean() > 0.03 and len(np.unique(pixels[grey].max(-1))) > 20, "the image, in many greys"
    page.uncheck("#segmentations label >> nth=1")
    page.locator("#segmentations input[type=range]").first.fill("1")
    only_reference = _pixels(page)
    assert all(_share(only_reference, colour) > 0.002 for colour in (ANTERIOR, POSTERIOR)), "the reference's labels"
    page.click("#segmentations button >> text=Anterior >> nth=0")
    without = _pixels(page)
    assert _share(without, ANTERIOR) == 0 and _share(without, POSTERIOR) > 0.002, "a click hides one label"
    page.keyboard.press("1")
    assert _share(_pixels(page), POSTERIOR) == 0, "a key hides the segmentation"
    page.locator("#views input").nth(1).check()
    assert (_pixels(page).max(-1) > 30).mean() > 0.03, "the axial plane alone"
    before, box = _voxel(page), page.locator("#canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2 + 20)
    page.wait_for_timeout(2000)
    assert [now != then for now, then in zip(_voxel(page), before, strict=True)] == [True, True, False]
    page.close()
    assert problems == []


def _voxel(page: Any) -> list[int]:
    """The voxel of the cross, as the page shows it."""
    match = re.match(r"voxel (\d+), (\d+), (\d+)\s+·\s+MRI \d+", page.inner_text("#place"))
    assert match
    return [int(n) for n in match.groups()]


def _pixels(page: Any) -> np.ndarray:
    """What the canvas shows (height, width, 3), as integers."""
    shot = page.locator("#canvas").screenshot(timeout=120_000)
    return np.asarray(Picture.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def _share(pixels: np.ndarray, colour: np.ndarray) -> float:
    return float((np.abs(pixels - colour).max(axis=-1) <= 3).mean())
