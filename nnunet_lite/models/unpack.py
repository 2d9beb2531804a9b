"""Unpacking a model that may come from anywhere: trusted in nothing.

What the manifest does not list, or is not a plain file of a model folder, is refused; so are a size that does not fit
and code to run. Nothing appears before every checksum is right.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from pydantic import ValidationError

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.files import must_be_known, must_fit, scratch, write_json
from nnunet_lite.inference.predictor import read_model
from nnunet_lite.models.bundle import CHUNK, FORMAT, MANIFEST, File, Manifest, must_be_name
from nnunet_lite.models.folder import FORMAT as MODEL_FORMAT
from nnunet_lite.models.folder import MODEL, set_aside
from nnunet_lite.settings import Settings
from nnunet_lite.system import in_units

LIMIT = 32 * 10**9  # bytes of an unpacked model
_JSON_LIMIT = 16 * 2**20  # bytes of a JSON file; a plan has 10 KB
_RATIO = 100  # weights shrink by a tenth; what unpacks to so many times its size is there to fill the disk
_JSONS = ("plans.json", "dataset.json", "run.json")
_FOLD = re.compile(r"fold_(all|\d+)")


def is_bundle(path: Path) -> bool:
    """Whether a path is a file to unpack and no folder."""
    return path.is_file() and path.suffix.lower() == ".zip"


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A model folder: the path itself, or of a zip a copy that the block's end deletes.

    Raises
    ------
    UserError : as `unpack`.
    """
    if not is_bundle(path):
        yield path
        return
    with scratch(Path(gettempdir())) as temporary:
        yield unpack(path, temporary / read_manifest(path).models[0])


def read_manifest(file: Path) -> Manifest:
    """What a zip says that it holds, and that this is all it holds.

    Raises
    ------
    UserError : see `unpack`.
    """
    with _opened(file) as (_, manifest):
        return manifest


def unpack(file: Path, out: Path, *, replace: bool = False, limit: int = LIMIT) -> Path:
    """Make a model folder of a zip; of a cascade its first stage too, beside `out` under the name that it has.

    Parameters
    ----------
    replace : set models aside that are there already; nothing is deleted.
    limit : bytes; a larger model is refused.

    Raises
    ------
    UserError : no zip of a model; damaged; of a newer nnlite; it holds other files than its manifest lists, or links,
        or paths that lead elsewhere; it is too large for `limit` or the disk; the model names code to run; or there is
        a model already.
    """
    out = out.absolute()
    with _opened(file) as (archive, manifest):
        _must_fit(manifest, file, out, limit)
        places = _places(manifest, out, replace)
        with scratch(out.parent) as temporary:
            with must_fit(out, temporary, sum(expected.size for expected in manifest.files.values())):
                for path, expected in manifest.files.items():
                    _extract(archive, path, expected, temporary / path, file)
                for number, name in enumerate(manifest.models):
                    _must_be_model(temporary / name, manifest.models[number + 1 :], file)
                write_json(temporary / manifest.models[0] / MANIFEST, manifest.model_dump(mode="json"))
            for name, place in reversed(places.items()):  # the model itself last
                if not _is_empty(place) and (old := set_aside(place)) is not None:
                    log.info(f"the model that was there is kept in {old}")
                (temporary / name).replace(place)
    return out


def _places(manifest: Manifest, out: Path, replace: bool) -> dict[str, Path]:
    """Where each model goes; a first stage that is there already, the same one, stays.

    Raises
    ------
    UserError : another model is there, and `replace` is not set.
    """
    model, *stages = manifest.models
    if out.name in stages:
        raise UserError("is the name of the model's first stage, which will lie beside it", out, "Choose another.")
    beside = {name: out.with_name(name) for name in stages}
    places = {model: out, **{name: place for name, place in beside.items() if not _is_same(place, name, manifest)}}
    taken = [place for place in places.values() if place.exists() and not _is_empty(place)]
    if taken and not replace:
        raise UserError("is there already", taken[0], "Choose another --output, or move it away.")
    return places


@contextmanager
def _opened(file: Path) -> Iterator[tuple[ZipFile, Manifest]]:
    """A zip whose list of files has been checked against its manifest."""
    if not file.is_file():
        raise UserError("no such file", file)
    try:
        with ZipFile(file) as archive:
            if MANIFEST not in archive.namelist() and any(name.endswith(".pth") for name in archive.namelist()):
                fix = "Unpack it, and import the model folder in it that holds plans.json."
                raise UserError("is a zip of nnU-Net, none of `nnlite export`", file, fix)
            for info in archive.infolist():
                _must_be_plain(info, file)
            manifest = _manifest(archive, file)
            _must_agree(archive, manifest, file)
            yield archive, manifest
    except (BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"is no zip file, or a damaged one ({error})", file, "Get it again.") from None


def _manifest(archive: ZipFile, file: Path) -> Manifest:
    """The manifest of this format.

    Raises
    ------
    UserError : there is none, or of another format.
    """
    try:
        info = archive.getinfo(MANIFEST)
    except KeyError:
        raise UserError(f"is no model that nnlite exported (no {MANIFEST})", file) from None
    try:
        if info.file_size > _JSON_LIMIT:
            raise ValueError(f"{info.file_size} bytes")
        values = json.loads(archive.read(info))
        must_be_known(str(values["format"]), FORMAT, file)
        return Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        what = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
    raise UserError(f"{MANIFEST} is not as nnlite writes it ({what})", file)


def _must_be_plain(info: ZipInfo, file: Path) -> None:
    """Refuse an entry that is no plain file inside the folder that the zip is unpacked to."""
    name, kind = info.filename, info.external_attr >> 16
    parts = name.rstrip("/").split("/")
    if name != info.orig_filename or "\\" in name or ":" in parts[0] or any(p in ("", ".", "..") for p in parts):
        raise UserError(f"holds {info.orig_filename!r:.80}, a path that leads elsewhere; nothing was unpacked", file)
    if info.is_dir() or stat.S_IFMT(kind) not in (0, stat.S_IFREG) or info.flag_bits & 1:
        raise UserError(f"holds {name!r:.80}, a folder, a link or encrypted; nothing was unpacked", file)
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise UserError(f"holds {name!r:.80}, compressed in another way than nnlite does", file)


def _must_agree(archive: ZipFile, manifest: Manifest, file: Path) -> None:
    """Refuse a zip that holds anything but the files that its manifest lists, or these in other sizes."""
    for name in (manifest.dataset, *manifest.models):
        must_be_name(name, file)
    for path in manifest.files:
        model, _, rest = path.partition("/")
        fold, _, weights = rest.partition("/")
        if model not in manifest.models or not (rest in _JSONS or (_FOLD.fullmatch(fold) and weights == MODEL)):
            raise UserError(f"lists {path!r:.80}, which is no part of a model", file)
    held = [info.filename for info in archive.infolist()]
    listed = {MANIFEST, *manifest.files}
    if odd := sorted({*held} ^ listed):
        fault = "lacks" if odd[0] in listed else "holds"
        raise UserError(f"{fault} {odd[0]!r:.80}, against its {MANIFEST}; nothing was unpacked", file)
    if len(held) > len(listed):
        raise UserError("holds a file twice", file)
    if sorted(manifest.models) != sorted({path.partition("/")[0] for path in manifest.files}):
        raise UserError(f"does not hold the models that its {MANIFEST} names", file)
    for path, expected in manifest.files.items():
        if (found := archive.getinfo(path).file_size) != expected.size:
            raise UserError(f"{path} has {found} bytes, {expected.size} in its {MANIFEST}", file)


def _must_fit(manifest: Manifest, file: Path, out: Path, limit: int) -> None:
    """Refuse more bytes than are allowed, than the disk has room for, or than such a file can hold."""
    sizes = {path: expected.size for path, expected in manifest.files.items()}
    total, packed = sum(sizes.values()), file.stat().st_size
    place = next(folder for folder in out.parents if folder.exists())
    if big := [path for path, size in sizes.items() if path.endswith(".json") and size > _JSON_LIMIT]:
        raise UserError(f"{big[0]} has {sizes[big[0]]} bytes, which is too large", file)
    if total > _RATIO * packed:
        raise UserError(f"would unpack {packed} bytes to {total}, as no model does", file, "Do not trust this file.")
    if total > limit:
        raise UserError(f"would unpack to {in_units(total)}, {in_units(limit)} are allowed", file)
    if total > (free := shutil.disk_usage(place).free):
        raise UserError(f"would unpack to {in_units(total)}, {in_units(free)} are free in {place}", file)


def _extract(archive: ZipFile, path: str, expected: File, target: Path, file: Path) -> None:
    """Unpack a file, never more bytes of it than the manifest says.

    Raises
    ------
    UserError : it is another file than the one that was packed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with archive.open(path) as source, target.open("xb") as out:
        while (chunk := source.read(CHUNK)) and (size := size + len(chunk)) <= expected.size:
            digest.update(chunk)
            out.write(chunk)
    if size != expected.size or digest.hexdigest() != expected.sha256:
        raise UserError(f"{path} is not what was packed: its checksum is another", file, "Get the file again.")


def _must_be_model(folder: Path, stages: Sequence[str], file: Path) -> None:
    """Refuse what could not be predicted with: a plan or settings that this version cannot read, or code to run."""
    try:
        plan, run = read_model(folder)
        must_be_known(str(run["format"]), MODEL_FORMAT, file)
        is_second = plan.configuration(run["configuration"]).previous_stage is not None
        settings = Settings.model_validate(run["settings"])
    except UserError as error:
        raise UserError(f"{folder.name}: {error.what}", file, error.fix) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder.name}/run.json cannot be read ({type(error).__name__})", file) from None
    if settings.network.factory is not None:
        raise UserError(f"names code to run, {settings.network.factory}; it was not run", file)
    if [run.get("previous")] * is_second != list(stages):
        raise UserError(f"does not hold the first stage that {folder.name} needs, or another one", file)


def _is_same(folder: Path, name: str, manifest: Manifest) -> bool:
    """Whether a folder holds a model of a manifest as it is in the zip."""
    files = {
        path.partition("/")[2]: expected for path, expected in manifest.files.items() if path.startswith(f"{name}/")
    }
    return all((folder / path).is_file() and _hash(folder / path) == expected for path, expected in files.items())


def _hash(file: Path) -> File:
    with file.open("rb") as content:
        return File(sha256=hashlib.file_digest(content, "sha256").hexdigest(), size=file.stat().st_size)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
