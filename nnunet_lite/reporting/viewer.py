"""`nnlite view`: images with their segmentations on a page that only this machine can open.

`read_case_scene` and `read_file_scene` read what is shown of a case; `serve` serves it. The page (viewer_page/) draws
the slices itself, and NiiVue the three dimensions. All arrays are turned as in the report's pictures (`planes_of`).

A request gets what is served under exactly this path, so none can reach another file. The paths begin with a secret
token, which keeps out other users of the machine and other pages in the browser. A `Host` that is not this machine's is
refused, so no foreign name can point here (DNS rebinding). The browser starts with an address that works once, because
other users of the machine can read how a program was started.
"""

from __future__ import annotations

import glob
import json
import secrets
import threading
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.ndimage import affine_transform

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, map_labels
from nnunet_lite.data.geometry import ACCEPTABLE, Geometry
from nnunet_lite.data.images import Image, read_image, read_images, read_label
from nnunet_lite.data.labels import BACKGROUND, IGNORE, Colour, Labels, label_colours
from nnunet_lite.data.names import case_of, stem
from nnunet_lite.data.nifti import nifti_bytes, ras_affine
from nnunet_lite.errors import UserError, describe
from nnunet_lite.evaluation.scores import described_labels
from nnunet_lite.files import validated
from nnunet_lite.planning.schema import Channel
from nnunet_lite.reporting.pictures import ERROR_COLOURS, fullest_slices, grey_levels, planes_of

LabelMap = tuple[str, np.ndarray, Geometry]  # name, values (z, y, x), geometry

_MAX_LABELS = 1000  # a file with more values is rarely a label map
_LARGE = 1 << 21  # voxels; larger images are shown as a coarse copy until all of them has arrived
_COARSE = 128  # voxels along an axis of that copy, from which three dimensions are drawn too
_FINEST = 4096  # pixels along an axis, the most that all browsers can draw
_PAGE = Path(__file__).parent / "viewer_page"
_HOSTS = ("127.0.0.1", "localhost")  # with any port: `ssh -L 8000:127.0.0.1:PORT` changes it
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "nii": "application/octet-stream",
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_TIMEOUT_SECONDS = 30  # of a client that sends nothing, or that does not receive a piece
_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class SceneLayer:
    """An image channel, a segmentation, or a map of probability or uncertainty.

    Parameters
    ----------
    name : str
        What the page calls it.
    kind : {"image", "segmentation", "map"}
        What it is.
    read : callable
        Returns its voxels (z, y, x), or (3, z, y, x) of colours, on the grid of the scene as it is stored. A
        segmentation has 0 for the background and i for the i-th entry of the legend, a map 255 for 1.
    window : tuple of float or None
        The intensities of an image that are black and white.
    """

    name: str
    kind: Literal["image", "segmentation", "map"]
    read: Callable[[], np.ndarray]
    window: tuple[float, float] | None = None

    def nifti(self, geometry: Geometry, coarse: bool = False) -> bytes:
        """Return its voxels, turned as in the report, as a NIfTI file.

        Parameters
        ----------
        geometry : Geometry
            The grid of the scene.
        coarse : bool
            Every n-th voxel, as in `coarse_steps`.
        """
        turn, _ = planes_of(geometry)
        turned = geometry.turned(turn)
        steps = coarse_steps(turned.shape) if coarse else _steps(turned.shape, _FINEST)
        array = turn.apply(self.read())[..., :: steps[0], :: steps[1], :: steps[2]]
        z, y, x = (size * step for size, step in zip(turned.spacing, steps, strict=True))
        return nifti_bytes(array, replace(turned, shape=array.shape[-3:], spacing=(z, y, x)))


@dataclass(frozen=True)
class Scene:
    """What is shown of a case.

    Parameters
    ----------
    title : str
        The title of the page.
    layers : tuple of SceneLayer
        Images, segmentations and maps in the order of the page.
    legend : tuple
        (name, colour) of each label.
    geometry : Geometry
        The grid of all layers.
    at : tuple of int
        The slices that are shown first, of the turned array (z, y, x).
    has_reference : bool
        Whether the first segmentation is the reference, with which the others are compared.
    ignore : int or None
        The entry of the legend that is not compared.
    """

    title: str
    layers: tuple[SceneLayer, ...]
    legend: tuple[tuple[str, Colour], ...]
    geometry: Geometry
    at: tuple[int, ...]
    has_reference: bool
    ignore: int | None

    def to_json(self) -> dict[str, Any]:
        """Return what the page reads first."""
        turn, planes = planes_of(self.geometry)
        turned = self.geometry.turned(turn)
        legend, errors = (
            [{"name": n, "colour": c} for n, c in entries] for entries in (self.legend, ERROR_COLOURS.items())
        )
        return {
            "title": self.title, "shape": turned.shape, "spacing": turned.spacing, "at": self.at,
            "order": turn.order, "reversed": turn.reversed, "planes": [plane._asdict() for plane in planes],
            "fine": _steps(turned.shape, _FINEST), "coarse": coarse_steps(turned.shape),
            "layers": [{"name": layer.name, "kind": layer.kind, "window": layer.window} for layer in self.layers],
            "legend": legend, "errors": errors, "compared": self.has_reference, "ignore": self.ignore,
        }  # fmt: skip

    def pages(self) -> dict[str, Callable[[], bytes]]:
        """Return what is served of it, by name."""
        pages = {"scene.json": lambda: json.dumps(self.to_json()).encode()}
        for i, layer in enumerate(self.layers):
            pages[f"layer-{i}.nii"] = partial(layer.nifti, self.geometry)
            pages[f"layer-{i}-coarse.nii"] = partial(layer.nifti, self.geometry, coarse=True)
        return pages


def _steps(shape: Sequence[int], most: int) -> list[int]:
    """Return n for each axis, of which every n-th voxel is shown."""
    return [-(-size // most) for size in shape]


def coarse_steps(shape: Sequence[int]) -> list[int]:
    """Return n for each axis, of which the coarse copy has every n-th voxel; 1 for images that need none."""
    return _steps(shape, _COARSE) if np.prod(shape) > _LARGE else [1, 1, 1]


Model = Callable[[Image], np.ndarray]  # makes a label map of an image, such as one of `nnunet_lite.load`


def read_case_scene(
    dataset: Dataset,
    case: Case,
    predictions: Sequence[tuple[str, Path]],
    models: Sequence[tuple[str, Model]] = (),
    channels: Sequence[Channel | None] = (),
) -> Scene:
    """Read a case with its reference, its predictions, and the maps that were saved with these.

    Parameters
    ----------
    dataset : Dataset
        The planned dataset.
    case : Case
        One of its cases.
    predictions : sequence of (str, Path)
        Names and label maps.
    models : sequence of (str, callable)
        Names and models whose predictions are shown too.
    channels : sequence of Channel
        Those of the plan, for the grey levels; without them, levels are computed of the image.

    Raises
    ------
    UserError
        A file cannot be read, or contains values that are not labels of the dataset.
    """
    image = read_images(case.images, len(dataset.channels), dataset.accept_geometry)
    maps: list[LabelMap] = []
    if case.label is not None:
        values, geometry, _ = read_label(case.label, image.geometry)
        accepted = {what for what, *_ in geometry.differences(image.geometry)} <= {*ACCEPTABLE}
        geometry = image.geometry if dataset.accept_geometry and accepted else geometry
        maps.append(("reference", map_labels(values, dataset.value_map), geometry))
    maps += [(name, *read_label(file, image.geometry)[:2]) for name, file in predictions]
    maps += [(name, np.asarray(model(image)), image.geometry) for name, model in models]
    title, files = f"{case.id} ({dataset.name})", [file for _, file in predictions]
    layers = _image_layers(image, dataset.channels, channels)
    return _make_scene(title, image, layers, maps, dataset.labels, files, has_reference=case.label is not None)


def read_file_scene(
    file: Path, segmentations: Sequence[Path], labels: Labels | None = None, models: Sequence[tuple[str, Model]] = ()
) -> Scene:
    """Read an image file or DICOM series with label maps, and the maps that were saved with these.

    Parameters
    ----------
    file : Path
        The image file, or the folder of the DICOM series.
    segmentations : sequence of Path
        Its label maps; with the first one the others are compared.
    labels : Labels or None
        The names of their values; None numbers them.
    models : sequence of (str, callable)
        Names and models whose predictions are shown too.

    Raises
    ------
    UserError
        A file cannot be read, or contains values that are not in `labels`.
    """
    image, names = read_image(file), [file.name, *(path.name for path in segmentations)]
    maps: list[LabelMap] = []
    for path in segmentations:
        name = path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        maps.append((name, *read_label(path, image.geometry)[:2]))
    maps += [(name, np.asarray(model(image)), image.geometry) for name, model in models]
    layers = _image_layers(image, [f"channel {i}" for i in range(image.array.shape[0])])
    labels = labels or _described_labels(segmentations, maps) or _numbered_labels([values for _, values, _ in maps])
    return _make_scene(file.name, image, layers, maps, labels, segmentations, has_reference=len(maps) > 1)


def open_at(scene: Scene, voxel: Sequence[int] | None) -> Scene:
    """Return a scene that opens at a voxel.

    Parameters
    ----------
    scene : Scene
        From `read_case_scene` or `read_file_scene`.
    voxel : sequence of int or None
        The voxel (z, y, x) as stored, of a picture also (y, x); None for the slices that the scene has.

    Raises
    ------
    UserError
        The image has no such voxel.
    """
    if voxel is None:
        return scene
    shape, (turn, _) = scene.geometry.shape, planes_of(scene.geometry)
    voxel = (0, *voxel) if len(voxel) == 2 and shape[0] == 1 else voxel
    if len(voxel) != 3 or not all(0 <= n < size for n, size in zip(voxel, shape, strict=True)):
        fix = f"Give z from 0 to {shape[0] - 1}, y to {shape[1] - 1} and x to {shape[2] - 1}."
        raise UserError(f"{scene.title} has no voxel {' '.join(map(str, voxel))}", fix=fix)
    return replace(scene, at=turn.apply_to_voxel(voxel, shape))


def _make_scene(
    title: str,
    image: Image,
    layers: list[SceneLayer],
    maps: list[LabelMap],
    labels: Labels,
    files: Sequence[Path],
    has_reference: bool,
) -> Scene:
    """Make a scene; it opens at the slices with most errors, without a comparison with most foreground."""
    turn, _ = planes_of(image.geometry)
    found: list[np.ndarray] = []
    for name, values, geometry in maps:
        if {*labels.values, labels.ignore} == {0, 1, None} and not (values == 1).any():
            values = map_labels(values, {255: 1})  # as in `evaluate`
        try:
            found.append(_on_grid(name, labels.encode(values), geometry, image.geometry))
        except UserError as error:
            fix = "Give its labels the values of the dataset or model, or show it without -m and -d."
            raise UserError(error.what, name, fix) from None
        layers.append(SceneLayer(name, "segmentation", partial(np.asarray, found[-1])))
    layers += [layer for file in files for layer in _saved_maps(file, image.geometry)]
    at = tuple(n // 2 for n in turn.apply(image.array).shape[-3:])
    if found:
        annotated = found[0] != (labels.ignore_class or -1)
        wrong = (found[0] != found[-1]) & annotated
        at = fullest_slices(turn.apply(wrong if has_reference and wrong.any() else (found[0] != 0) & annotated))
    names = [*labels.class_names[1:], *([] if labels.ignore is None else [IGNORE])]
    legend = tuple(zip(names, label_colours(len(names)), strict=True))
    return Scene(title, tuple(layers), legend, image.geometry, at, has_reference, labels.ignore_class)


def _on_grid(name: str, classes: np.ndarray, geometry: Geometry, grid: Geometry) -> np.ndarray:
    """Return a label map on the grid of its image; if its own is another, the nearest voxel of each place."""
    differences = geometry.differences(grid)
    if not differences:
        return classes
    what, own, expected = differences[0]
    log.warn(f"{name}: its {what} {own} is not the image's, {expected}; it is shown where its header says")
    # the image's geometry if the file of the label map has no spacing
    geometry = geometry if geometry.calibrated else replace(grid, shape=geometry.shape)
    matrix = (np.linalg.inv(ras_affine(geometry)) @ ras_affine(grid))[[2, 1, 0, 3]][:, [2, 1, 0, 3]]
    moved: np.ndarray = affine_transform(classes, matrix, output_shape=grid.shape, order=0, mode="grid-constant")
    return moved


def _saved_maps(file: Path, grid: Geometry) -> list[SceneLayer]:
    """Return the maps that `nnlite predict` saved with a label map, and the uncertainty that follows from them."""
    name, folder = case_of(file), file.parent
    longer = tuple(f"{other}_" for other in map(case_of, folder.iterdir()) if other.startswith(f"{name}_"))

    def layers(kind: str, title: str) -> list[SceneLayer]:
        files = sorted((folder / kind).glob(f"{glob.escape(name)}_*.nii.gz"))
        own = {stem(path).removeprefix(f"{name}_"): path for path in files if not stem(path).startswith(longer)}
        return [SceneLayer(title.format(of), "map", partial(_read_map, path, grid)) for of, path in own.items()]

    shares, uncertainty = layers("probabilities", "probability of {}"), layers("uncertainty", "uncertainty ({})")
    if shares and not uncertainty:
        uncertainty = [SceneLayer("uncertainty (entropy)", "map", partial(_entropy_of, shares))]
    return [*uncertainty, *shares]


def _read_map(file: Path, grid: Geometry) -> np.ndarray:
    """Read a map of numbers from 0 to 1 as bytes."""
    image = read_image(file)
    if image.geometry.shape != grid.shape:
        raise UserError(f"has shape {image.geometry.shape}, its image {grid.shape}", file)
    return np.rint(image.array[0] * 255).astype(np.uint8)


def _entropy_of(shares: Sequence[SceneLayer]) -> np.ndarray:
    """Return the entropy of probabilities, as bytes: of all labels together if the background is among them.

    Otherwise it is the mean over the labels, each against the rest.
    """
    exclusive = any(layer.name == f"probability of {BACKGROUND}" for layer in shares)
    share = np.arange(256, dtype=np.float32) / 255
    table = -share * np.log(np.maximum(share, 1 / 255))  # of each byte
    table = table / np.log(len(shares)) if exclusive else (table + table[::-1]) / np.log(2) / len(shares)
    total: Any = sum(table[layer.read()] for layer in shares)
    return np.rint(255 * np.minimum(total, 1)).astype(np.uint8)


def _image_layers(image: Image, names: Sequence[str], channels: Sequence[Channel | None] = ()) -> list[SceneLayer]:
    """Make a layer for each channel; a colour picture is one layer."""
    if image.is_colour:
        return [SceneLayer("colours", "image", partial(np.asarray, image.array), (0.0, 255.0))]
    layers: list[SceneLayer] = []
    for name, channel, about in zip(names, image.array, channels or [None] * len(names), strict=True):
        if channel.dtype.kind == "b":
            channel = channel.astype(np.uint8)
        elif channel.dtype.kind == "f":
            channel = np.nan_to_num(channel.astype(np.float32, copy=False), posinf=0, neginf=0)
        elif channel.dtype.itemsize > 4:
            channel = channel.astype(np.float32)
        layers.append(SceneLayer(name, "image", partial(np.asarray, channel), grey_levels(channel, about)))
    return layers


def _described_labels(files: Sequence[Path], maps: Sequence[LabelMap]) -> Labels | None:
    """Return the labels that a dataset.json or predictions.json beside the first file names, if they fit all maps."""
    try:
        labels = described_labels(files[0], files[0])[1] if files else None
    except UserError:
        return None
    known = labels and {*labels.values, labels.ignore}
    return labels if known and all(known.issuperset(np.unique(values).tolist()) for _, values, _ in maps) else None


def _numbered_labels(maps: Sequence[np.ndarray]) -> Labels:
    """Return labels with their numbers as names."""
    found = sorted({int(value) for array in maps for value in np.unique(array)} - {0})
    if len(found) > _MAX_LABELS:
        raise UserError(f"{len(found)} different values are too many for label maps", fix="The image comes first.")
    with validated():
        return Labels(names={BACKGROUND: 0, **{f"label {value}": value for value in found or [1]}})


# ----------------------------------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class View:
    """A scene that is served until `close` or the end of the process.

    Parameters
    ----------
    url, title : str
        The address and the title of the page.
    server : ThreadingHTTPServer
        Its server, which runs in a thread.
    redirects : dict
        Paths that work once -> their target.
    """

    url: str
    title: str
    server: ThreadingHTTPServer
    redirects: dict[str, str]

    def one_time_url(self) -> str:
        """Return an address that leads to `url` the first time that it is opened."""
        root, path = self.url.rsplit("/", 2)[0], f"/{secrets.token_urlsafe(24)}"
        self.redirects[path] = self.url
        return root + path

    def to_text(self) -> str:
        return self.url

    __repr__ = to_text

    def to_json(self) -> dict[str, str]:
        return {"url": self.url, "title": self.title}

    def wait(self) -> None:
        """Wait until Ctrl-C; the page is served from a thread."""
        log.info(f"{self.title}: readable on this machine alone; Ctrl-C ends it")
        threading.Event().wait()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(read: Callable[[str], Scene], cases: Mapping[str, float | None], first: str) -> View:
    """Serve cases on a free port of 127.0.0.1, from a thread.

    Parameters
    ----------
    read : callable
        Returns the scene of a case. Each case is read when it is opened.
    cases : mapping of str to float or None
        The mean Dice of each case, where it is known, in the order of the page.
    first : str
        The case that is opened first.

    Raises
    ------
    UserError
        The first case cannot be read.
    """
    root, ids, lock = f"/{secrets.token_urlsafe(24)}/", list(cases), threading.Lock()
    scene_of = lru_cache(2)(read)  # the case that is shown, and the one before it
    title = scene_of(first).title
    listed = {"cases": list(cases.items()), "first": ids.index(first)}
    pages = {path.name: path.read_bytes() for path in _PAGE.iterdir() if path.suffix in (".css", ".js")}
    pages |= {"": (_PAGE / "index.html").read_bytes(), "cases.json": json.dumps(listed).encode()}
    numbers = {str(i): case for i, case in enumerate(ids)}

    def find(path: str) -> bytes | None:
        if not path.startswith(root):
            return None
        name = path.removeprefix(root)
        number, _, part = name.partition("/")
        if name in pages or number not in numbers:
            return pages.get(name)
        try:
            with lock:  # so that no case is read twice
                scene = scene_of(numbers[number])
            page = scene.pages().get(part)
            return page and page()
        except (UserError, OSError, MemoryError) as error:
            log.warn(describe(error))
            return json.dumps({"problem": describe(error)}).encode() if part == "scene.json" else None

    redirects: dict[str, str] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, find, redirects))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    return View(f"http://127.0.0.1:{server.server_address[1]}{root}", title, server, redirects)


def open_browser(view: View) -> bool:
    """Open a view in the user's browser, unless it is one of the terminal, which would take the terminal.

    Parameters
    ----------
    view : View
        From `serve`.

    Returns
    -------
    bool
        Whether a browser was opened.
    """
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    return type(browser) is not webbrowser.GenericBrowser and browser.open(view.one_time_url())


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of what `find` returns for exactly this path, and GET of `redirects` once."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "nnlite", ""
    timeout = _TIMEOUT_SECONDS

    def __init__(self, find: Callable[[str], bytes | None], redirects: dict[str, str], *args: Any) -> None:
        self.find, self.redirects = find, redirects
        super().__init__(*args)

    def handle(self) -> None:
        with suppress(ConnectionError):  # a browser may close the connection at any time
            super().handle()

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].partition(":")[0].lower() not in _HOSTS:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        elif self.command == "GET" and (target := self.redirects.pop(self.path, None)):
            self._respond(HTTPStatus.SEE_OTHER, {"Location": target}, b"")
        elif (contents := self.find(self.path)) is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            ending = (self.path.rpartition("/")[2] or "index.html").rpartition(".")[2]
            self._respond(HTTPStatus.OK, {"Content-Type": _TYPES[ending]}, contents)

    do_HEAD = do_GET

    def _respond(self, status: HTTPStatus, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            for i in range(0, len(body), _PIECE):  # the timeout is of each piece
                self.wfile.write(body[i : i + _PIECE])

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Do not print requests."""
