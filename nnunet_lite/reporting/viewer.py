"""A page that shows one scene, served on this machine alone.

Everything that can be read lies in memory under exact paths, so no request can reach a file. The paths begin with a
token that cannot be guessed, which shuts out the machine's other users and other pages in the browser; a `Host` that is
not this machine's is refused, so that no foreign name can be made to point here (DNS rebinding). The browser is started
with an address that works once, for other users of the machine can read how a program was started.
"""

from __future__ import annotations

import json
import secrets
import threading
import webbrowser
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from nnunet_lite import log
from nnunet_lite.reporting.scene import Scene

_HOSTS = ("127.0.0.1", "localhost")  # with any port: `ssh -L 8000:127.0.0.1:PORT` changes it
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "nii": "application/octet-stream",
}
_PAGE = ("viewer.css", "viewer.js", "niivue.js")
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
_SECONDS_OF_PATIENCE = 30  # with a client that says nothing


@dataclass(frozen=True)
class View:
    """A scene that is being served, until `close` or the end of the process."""

    url: str
    title: str
    server: ThreadingHTTPServer
    doors: dict[str, str]  # paths that work once -> where they lead

    def one_time_url(self) -> str:
        """An address that leads to `url` the first time that it is opened."""
        root, path = self.url.rsplit("/", 2)[0], f"/{secrets.token_urlsafe(24)}"
        self.doors[path] = self.url
        return root + path

    def to_text(self) -> str:
        return self.url

    def to_json(self) -> dict[str, str]:
        return {"url": self.url, "title": self.title}

    def wait(self) -> None:
        """Block; the page is served from a thread."""
        log.info(f"{self.title}: readable on this machine alone, until Ctrl-C")
        threading.Event().wait()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(scene: Scene) -> View:
    """Serve a scene on a free port of 127.0.0.1, from a thread."""
    root = f"/{secrets.token_urlsafe(24)}/"
    pages = {root + name: contents for name, contents in _pages(scene).items()}
    doors: dict[str, str] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, pages, doors))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    return View(f"http://127.0.0.1:{server.server_address[1]}{root}", scene.title, server, doors)


def open_browser(view: View) -> bool:
    """Open a view in the user's browser; not in one of the terminal, which would take the terminal."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    return type(browser) is not webbrowser.GenericBrowser and browser.open(view.one_time_url())


def _pages(scene: Scene) -> dict[str, bytes]:
    """Name -> contents of all that there is to read; the page itself has the empty name."""
    urls = [f"layer-{i}.nii" for i in range(len(scene.layers))]
    layers = [layer.to_json(url) for layer, url in zip(scene.layers, urls, strict=True)]
    about = {"title": scene.title, "flat": scene.flat, "to_voxel": scene.to_voxel, "layers": layers}
    page = files("nnunet_lite.reporting") / "viewer_page"
    return {
        "": (page / "index.html").read_bytes(),
        **{name: (page / name).read_bytes() for name in _PAGE},
        "scene.json": json.dumps(about).encode(),
        **{url: layer.nifti for layer, url in zip(scene.layers, urls, strict=True)},
    }


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of `pages`, path -> contents, and once of `doors`; paths are compared character by character."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "nnlite", ""
    timeout = _SECONDS_OF_PATIENCE

    def __init__(self, pages: Mapping[str, bytes], doors: dict[str, str], *args: Any) -> None:
        self.pages, self.doors = pages, doors
        super().__init__(*args)

    def handle(self) -> None:
        with suppress(ConnectionError):  # a browser may turn away at any time
            super().handle()

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _refuse_method(self) -> None:
        self.close_connection = True  # what it sent is not read
        self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method

    def _answer(self, with_body: bool) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].partition(":")[0].lower() not in _HOSTS:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        if with_body and (behind := self.doors.pop(self.path, None)):
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Location", behind)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        contents = self.pages.get(self.path)
        if contents is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        name = self.path.rpartition("/")[2] or "index.html"
        self.send_header("Content-Type", _TYPES[name.rpartition(".")[2]])
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        if with_body:
            self.wfile.write(contents)

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are nobody's news."""
