"""`nnlite view`: an image with its segmentations on a page that only this machine can open.

`read_case_scene` and `read_file_scene` read what is shown, as NIfTI in memory; `serve` serves it, and NiiVue draws it
in the browser (viewer_page/).

All contents are in memory under exact paths, so no request can reach a file. The paths begin with a secret token, which
keeps out other users of the machine and other pages in the browser. A `Host` that is not this machine's is refused, so
no foreign name can point here (DNS rebinding). The browser starts with an address that works once, because other users
of the machine can read how a program was started.
"""

from __future__ import annotations

import json
import secrets
import threading
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, map_labels
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import Image, read_image, read_images, read_label
from nnunet_lite.data.labels import ADDED, BACKGROUND, CONFUSED, IGNORE, MISSED, Colour, Labels, label_colours
from nnunet_lite.data.nifti import nifti_bytes, ras_affine
from nnunet_lite.errors import UserError

LabelMap = tuple[str, np.ndarray, Geometry]  # name, values (z, y, x), geometry

_ERRORS: tuple[tuple[str, Colour], ...] = (("missed", MISSED), ("added", ADDED), ("another label", CONFUSED))
_WINDOW = (0.5, 99.5)  # percentiles of the intensities that are black and white
_WINDOW_SAMPLES = 1 << 20  # voxels from which they are computed
_MAX_LABELS = 1000  # a file with more values is rarely a label map
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
_TIMEOUT_SECONDS = 30  # of a client that sends nothing


@dataclass(frozen=True)
class SceneLayer:
    """An image channel, or a segmentation.

    Parameters
    ----------
    name : str
        What the page calls it.
    kind : {"image", "segmentation"}
        What it is.
    nifti : bytes
        A segmentation has voxels 0 for the background and i for the i-th entry of its legend.
    legend : tuple
        (name, colour) of each label.
    window : tuple of float or None
        The intensities that are black and white; None leaves them to the viewer.
    shown : bool
        Whether it is visible at first.
    """

    name: str
    kind: Literal["image", "segmentation"]
    nifti: bytes
    legend: tuple[tuple[str, Colour], ...] = ()
    window: tuple[float, float] | None = None
    shown: bool = True


@dataclass(frozen=True)
class Scene:
    """Layers in the order of drawing.

    Parameters
    ----------
    title : str
        The title of the page.
    layers : tuple of SceneLayer
        What it shows.
    to_voxel : list of list of float, shape (3, 4)
        Matrix from RAS mm to the image's voxels (x, y, z).
    flat : bool
        Whether it is a picture, which has one plane and no left and right.
    """

    title: str
    layers: tuple[SceneLayer, ...]
    to_voxel: list[list[float]]
    flat: bool


Model = Callable[[Image], np.ndarray]  # makes a label map of an image, such as one of `nnunet_lite.load`


def read_case_scene(
    dataset: Dataset, case: Case, predictions: Sequence[tuple[str, Path]], models: Sequence[tuple[str, Model]] = ()
) -> Scene:
    """Read a case with its reference, predictions, and where they differ from the reference.

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

    Raises
    ------
    UserError
        A file cannot be read, or contains values that are not labels of the dataset.
    """
    image = read_images(case.images, len(dataset.channels), dataset.accept_geometry)
    maps: list[LabelMap] = []
    if case.label is not None:
        values, geometry, _ = read_label(case.label, image.geometry)
        maps.append(("reference", map_labels(values, dataset.value_map), geometry))
    maps += [(name, *read_label(file, image.geometry)[:2]) for name, file in predictions]
    maps += [(name, np.asarray(model(image)), image.geometry) for name, model in models]
    title, labels = f"{case.id} ({dataset.name})", dataset.labels
    return _make_scene(title, image, dataset.channels, maps, labels, has_reference=case.label is not None)


def read_file_scene(
    file: Path, segmentations: Sequence[Path], labels: Labels | None = None, models: Sequence[tuple[str, Model]] = ()
) -> Scene:
    """Read an image file or DICOM series with label maps.

    Parameters
    ----------
    file : Path
        The image file, or the folder of the DICOM series.
    segmentations : sequence of Path
        Its label maps.
    labels : Labels or None
        The names of their values; None numbers them.
    models : sequence of (str, callable)
        Names and models whose predictions are shown too.

    Raises
    ------
    UserError
        A file cannot be read, or contains values that are not in `labels`.
    """
    image, names = read_image(file), [path.name for path in segmentations]
    maps: list[LabelMap] = []
    for path in segmentations:
        name = path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        maps.append((name, *read_label(path, image.geometry)[:2]))
    maps += [(name, np.asarray(model(image)), image.geometry) for name, model in models]
    channels = [f"channel {i}" for i in range(image.array.shape[0])]
    labels = labels or _numbered_labels([values for _, values, _ in maps])
    return _make_scene(file.name, image, channels, maps, labels, has_reference=False)


def _make_scene(
    title: str, image: Image, channels: Sequence[str], maps: list[LabelMap], labels: Labels, has_reference: bool
) -> Scene:
    """Make layers of everything; if the first map is the reference, the others are compared with it."""
    layers, names = _image_layers(image, channels), _label_names(labels)
    legend, reference = tuple(zip(names, label_colours(len(names)), strict=True)), None
    errors = []
    for name, values, geometry in maps:
        # the image's geometry if the file of the label map has no spacing
        geometry = geometry if geometry.calibrated else replace(image.geometry, shape=geometry.shape)
        if differences := geometry.differences(image.geometry):
            what, found, expected = differences[0]
            log.warn(f"{name}: its {what} {found} is not the image's, {expected}; it is shown where its header says")
        if {*labels.values, labels.ignore} == {0, 1, None} and not (values == 1).any():
            values = map_labels(values, {255: 1})  # as in `evaluate`
        try:
            classes = labels.encode(values)
        except UserError as error:
            fix = "Give its labels the values of the dataset or model, or show it without -m and -d."
            raise UserError(error.what, name, fix) from None
        layers.append(SceneLayer(name, "segmentation", nifti_bytes(classes, geometry), legend))
        if has_reference and reference is None:
            reference = classes
        elif reference is not None and classes.shape == reference.shape:
            kinds = nifti_bytes(_compare(reference, classes), geometry)
            errors.append(SceneLayer(f"errors of {name}", "segmentation", kinds, _ERRORS, shown=False))
    to_voxel = np.linalg.inv(ras_affine(image.geometry))[:3].tolist()
    return Scene(title, (*layers, *errors), to_voxel, image.geometry.dimensions == 2)


def _image_layers(image: Image, names: Sequence[str]) -> list[SceneLayer]:
    """Make a layer for each channel, the first one visible; a colour picture is one layer."""
    array, geometry = image.array, image.geometry
    if image.is_colour:
        return [SceneLayer("colours", "image", nifti_bytes(array, geometry))]
    layers: list[SceneLayer] = []
    for name, channel in zip(names, array, strict=True):
        if channel.dtype.kind == "b":
            channel = channel.astype(np.uint8)
        elif channel.dtype.kind == "f":
            channel = np.nan_to_num(channel.astype(np.float32, copy=False), posinf=0, neginf=0)
        elif channel.dtype.itemsize > 4:
            channel = channel.astype(np.float32)
        flat = channel.reshape(-1)
        low, high = (float(v) for v in np.percentile(flat[:: max(1, flat.size // _WINDOW_SAMPLES)], _WINDOW))
        window = (low, high) if high > low else None
        nifti = nifti_bytes(channel, geometry)
        layers.append(SceneLayer(name, "image", nifti, window=window, shown=not layers))
    return layers


def _compare(reference: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return 0 where both are equal, otherwise 1, 2, 3 as in `_ERRORS`."""
    out = np.where(classes == 0, np.uint8(1), np.where(reference == 0, np.uint8(2), np.uint8(3)))
    out[classes == reference] = 0
    return out


def _label_names(labels: Labels) -> list[str]:
    """Return the name of each foreground class: its label, or the regions that contain it."""
    regions = list(zip(labels.region_names, labels.region_values, strict=True))
    names = [" + ".join(name for name, values in regions if value in values) for value in labels.values[1:]]
    return names if labels.ignore is None else [*names, IGNORE]


def _numbered_labels(maps: Sequence[np.ndarray]) -> Labels:
    """Return labels with their numbers as names."""
    found = sorted({int(value) for array in maps for value in np.unique(array)} - {0})
    if len(found) > _MAX_LABELS:
        raise UserError(f"{len(found)} different values are too many for label maps", fix="The image comes first.")
    try:
        return Labels(names={BACKGROUND: 0, **{f"label {value}": value for value in found or [1]}})
    except ValidationError as error:
        raise UserError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None


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


def serve(scene: Scene) -> View:
    """Serve a scene on a free port of 127.0.0.1, from a thread.

    Parameters
    ----------
    scene : Scene
        What the page shows.
    """
    root = f"/{secrets.token_urlsafe(24)}/"
    layers: list[dict[str, Any]] = []
    pages = {path.name: path.read_bytes() for path in _PAGE.iterdir() if path.suffix in (".css", ".js")}
    for i, layer in enumerate(scene.layers):
        legend = [{"name": name, "colour": colour} for name, colour in layer.legend]
        about = {"name": layer.name, "kind": layer.kind, "shown": layer.shown, "window": layer.window}
        layers.append({**about, "url": f"layer-{i}.nii", "legend": legend})
        pages[f"layer-{i}.nii"] = layer.nifti
    content = {"title": scene.title, "flat": scene.flat, "to_voxel": scene.to_voxel, "layers": layers}
    pages |= {"": (_PAGE / "index.html").read_bytes(), "scene.json": json.dumps(content).encode()}
    redirects: dict[str, str] = {}
    handler = partial(_Handler, {root + name: contents for name, contents in pages.items()}, redirects)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    return View(f"http://127.0.0.1:{server.server_address[1]}{root}", scene.title, server, redirects)


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
    """GET and HEAD of `pages` (path -> contents), and GET of `redirects` once; paths must match exactly."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "nnlite", ""
    timeout = _TIMEOUT_SECONDS

    def __init__(self, pages: Mapping[str, bytes], redirects: dict[str, str], *args: Any) -> None:
        self.pages, self.redirects = pages, redirects
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
        elif (contents := self.pages.get(self.path)) is None:
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
            self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Do not print requests."""
