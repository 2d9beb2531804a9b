"""A model in one zip file that describes itself: packed, and unpacked without trusting it.

model.zip
  manifest.json              format, version, licence, note on the training data, sha256 and size of every other file
  3d_fullres-default/        a model folder with what predicting needs: plans.json dataset.json run.json
    fold_0/model.safetensors
  3d_lowres-default/         of a cascade, the first stage

The zip contains no path of the machine, no case and no code. Unpacking refuses files that the manifest does not list,
anything but plain files of a model folder, wrong sizes, and code. Nothing appears before every checksum is right. Of a
zip that nnU-Net exported, plans, dataset, checkpoints and licence are unpacked and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from pydantic import BaseModel, Field

import nnunet_lite
from nnunet_lite.data.problems import few
from nnunet_lite.errors import UserError
from nnunet_lite.files import (
    atomic,
    is_folder_name,
    must_be_known,
    read_json,
    read_text,
    read_validated,
    understood,
    write_json,
)
from nnunet_lite.models.folder import (
    CASES,
    EXPECTED,
    MODEL,
    QUALITY,
    new_model_folder,
    read_run,
    stage_path,
    weight_files,
)
from nnunet_lite.models.lookup import describe_folder, read_model
from nnunet_lite.settings import Settings
from nnunet_lite.system import in_units

FORMAT = "nnlite-bundle-1"
MANIFEST = "manifest.json"
LIMIT = 32 * 10**9  # bytes of an unpacked model
_JSON_LIMIT = 128 * 2**20  # bytes of a JSON file; a plan has 10 KB, nnU-Net's scores 300 bytes a case and label
_RATIO = 100  # weights shrink by a tenth; a file that grows by more than this factor is meant to fill the disk
_LICENCE_WIDTH = 80  # of the first words of a licence
_PART = re.compile(  # of a model folder
    rf"(plans|dataset|run|quality)\.json|fold_(all|\d+)/({re.escape(MODEL)}|{re.escape(CASES)})"
)
_NNUNET_PART = re.compile(  # of a model folder of nnU-Net; no part of its path begins with a dot
    r"((?:[^/\\:.][^/\\:]*/)*)"
    r"((?:plans|dataset)\.json|fold_(?:all|\d+)/(?:checkpoint_(?:final|best)\.pth|validation/summary\.json))"
)
_LICENCE = re.compile(r"((?:[^/\\:.][^/\\:]*/)*)LICEN[CS]E(?:\.\w+)?")  # of what is in the same folder, or further in
_ABOUT = ("configuration", "recipe", "channels", "labels", "spacing")  # what the manifest says of a model
# the entries of dataset.json that are packed; nnU-Net's may list the cases and their files
_PUBLIC = ("name", "description", "reference", "licence", "license", "release", "channel_names", "modality", "labels",
           "regions_class_order", "file_ending", "numTraining")  # fmt: skip


class PackedFile(BaseModel, frozen=True):
    """Checksum and size (bytes) of a file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel, frozen=True):
    """What a zip contains.

    Parameters
    ----------
    made_by : str
        The version of nnlite that wrote it.
    dataset : str
        The name of the dataset that the model was trained on.
    models : tuple of str
        Folder names: the model, then its first stage if it has one.
    about : dict
        Configuration, channels, labels, the mean Dice of each fold's held-out cases, and the postprocessing if there is
        any.
    licence : str, optional
        An SPDX identifier, or the text.
    training_data : str, optional
        A note on what the model was trained on.
    files : dict
        Path in the zip -> checksum and size, of all files but the manifest.
    """

    format: str = FORMAT
    made_by: str
    dataset: str
    models: tuple[str, ...] = Field(min_length=1, max_length=2)
    about: dict[str, Any]
    licence: str | None = None
    training_data: str | None = None
    files: dict[str, PackedFile]


# ------------------------------------------------------------------------------------------------------------- packing


def pack(
    folder: Path,
    out: Path,
    *,
    licence: str | None = None,
    note: str | None = None,
    postprocessing: Mapping[str, Mapping[str, Any]] | None = None,
) -> Manifest:
    """Write the trained folds of a model folder, and of a cascade's first stage, into a zip.

    Equal models make equal files, to the byte.

    Parameters
    ----------
    folder : Path
        The model folder.
    out : Path
        The zip to write.
    licence : str, optional
        An SPDX identifier such as "CC-BY-4.0", the text, or the name of its file; by default that of the zip from
        which the model was imported.
    note : str, optional
        On the training data; the same default.
    postprocessing : mapping, optional
        Label or region -> rule, as inference.json has them.

    Raises
    ------
    UserError
        There is no model folder, no trained fold or no first stage; the network is code; `out` exists already; or the
        file of the licence is not UTF-8.
    """
    if out.exists():
        raise UserError("exists already", out, "Choose another file, or delete it.")
    folder = folder.absolute()
    plan, run = read_model(folder)
    folders = [folder]
    if stage := plan.configuration(run["configuration"]).previous_stage:
        if (first := stage_path(folder, run)) is None:
            raise UserError(f"does not name its first stage, a model of {stage}", folder / "run.json")
        folders.append(first)
    if licence and len(licence) < 256 and "\n" not in licence and Path(licence).is_file():
        licence = read_text(Path(licence))
    imported = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    about = describe_folder(folder)
    with atomic(out) as temporary, ZipFile(temporary, "w") as archive:
        files = {path: _write(archive, path, content) for model in folders for path, content in _contents(model)}
        manifest = Manifest(
            made_by=f"nnunet_lite {nnunet_lite.__version__}",
            dataset=plan.dataset,
            models=tuple(model.name for model in folders),
            about={key: about[key] for key in _ABOUT}
            | {"mean_dice": {fold: state["mean_dice"] for fold, state in about["folds"].items()}}
            | ({"postprocessing": postprocessing} if postprocessing else {}),
            licence=licence or imported.get("licence"),
            training_data=note or imported.get("training_data"),
            files=files,
        )
        _check_names(manifest, folder)
        _write(archive, MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each file of a model folder that is packed."""
    plan, run = read_model(folder)
    weights, settings = weight_files(folder), run["settings"]
    if not weights:
        raise UserError("has no trained fold", folder, "Train one with `nnlite train`.")
    if (factory := settings["network"].get("factory")) is not None:
        raise UserError(f"has a network made by {factory}: code is not packed", folder, "Use --format onnx.")
    if (start := settings["training"].get("init")) is not None:
        settings["training"]["init"] = Path(start).name
    run.pop("changed", None)  # the history of the run may name folders too
    dataset = {key: value for key, value in read_json(folder / "dataset.json").items() if key in _PUBLIC}
    for name, value in (("plans", plan.as_dict()), ("dataset", dataset), ("run", run)):
        yield f"{folder.name}/{name}.json", f"{json.dumps(value, indent=1)}\n".encode()
    if (quality := folder / QUALITY).is_file():
        yield f"{folder.name}/{QUALITY}", quality.read_bytes()
    for fold, file in weights.items():
        yield f"{folder.name}/fold_{fold}/{MODEL}", file.read_bytes()
        if (cases := file.with_name(CASES)).is_file():
            yield f"{folder.name}/fold_{fold}/{CASES}", cases.read_bytes()


def _write(archive: ZipFile, path: str, content: bytes) -> PackedFile:
    """Add a file without date and owner. Weights are not compressed: they hardly shrink."""
    info = ZipInfo(path)
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.compress_type = ZIP_STORED if path.endswith(MODEL) else ZIP_DEFLATED
    archive.writestr(info, content)
    return PackedFile(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


# ----------------------------------------------------------------------------------------------------------- unpacking


def is_zip(path: Path) -> bool:
    """Whether a path is a zip file."""
    return path.is_file() and path.suffix.lower() == ".zip"


def is_imported(folder: Path) -> bool:
    """Whether a model folder was made by `nnlite import`."""
    return (folder / MANIFEST).is_file() or "imported_from" in read_run(folder)


def models_in_zip(file: Path) -> list[Path]:
    """Return the paths of the models in a zip: that of the zip if `pack` made it; zip / folder for those of nnU-Net.

    A model of nnU-Net that is not in a folder has the path zip / name of the zip.

    Raises
    ------
    UserError
        It is no zip, or contains no model.
    """
    with _open_zip(file) as archive:
        names = archive.namelist()
    parts = [match.groups() for match in map(_NNUNET_PART.fullmatch, names) if match]
    trained = {folder for folder, part in parts if part.endswith(".pth")}
    folders = sorted(folder for folder, part in parts if part == "plans.json" and folder in trained)
    if MANIFEST not in names and not folders:
        contained = few([ascii(name) for name in names]) or "nothing"
        what = "is no zip of a model: no manifest.json, and no plans.json next to fold_0/checkpoint_final.pth"
        raise UserError(f"{what}; it contains {contained}", file, EXPECTED)
    return [file] if MANIFEST in names else [file / (folder or file.stem) for folder in folders]


def unpack_nnunet(file: Path, model: Path, out: Path) -> Path:
    """Write what predicting needs of a model in a zip of nnU-Net, its licence, and its first stage if it is a cascade.

    Parameters
    ----------
    file : Path
        The zip, from any source.
    model : Path
        One of `models_in_zip`.
    out : Path
        An empty folder.

    Returns
    -------
    Path
        The model folder of nnU-Net in `out`.

    Raises
    ------
    UserError
        The zip is damaged, or too large for nnlite or for the disk.
    """
    folder = f"{model.relative_to(file).as_posix()}/"
    with _open_zip(file) as archive:
        names = archive.namelist()
        folder = folder if f"{folder}plans.json" in names else ""
        wanted = {folder, re.sub("__3d_cascade_fullres/$", "__3d_lowres/", folder)}  # as nnU-Net's planners call them
        parts = [match for match in map(_NNUNET_PART.fullmatch, names) if match and match[1] in wanted]
        targets = {match[0]: out / (Path(match[1]).name or model.name) / match[2] for match in parts}
        licences = [match for match in map(_LICENCE.fullmatch, names) if match and folder.startswith(match[1])]
        if licences:
            targets[max(licences, key=lambda match: len(match[1]))[0]] = out / model.name / "LICENSE"
        _check_size({name: archive.getinfo(name).file_size for name in targets}, file, out)
        for name, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    return out / model.name


def find_licence(folder: Path, checkpoint: Mapping[str, Any]) -> str | None:
    """Return the first words of the licence of a model; None if none is given.

    Parameters
    ----------
    folder : Path
        The model folder, or the one of a checkpoint. `manifest.json`, `dataset.json`, a file LICENSE and the header of
        a README.md are read.
    checkpoint : mapping
        The content of a checkpoint, which may name it.
    """
    jsons = [read_json(file) for name in (MANIFEST, "dataset.json") if (file := folder / name).is_file()]
    described = [about for about in (checkpoint, *jsons) if isinstance(about, Mapping)]
    texts = [about.get(key) for about in described for key in ("licence", "license")]
    for pattern, words in (("LICEN[CS]E*", r"\s*(.+)"), ("README.md", r"---\s(?:(?!^---).)*?^license: *(.+?)$")):
        for file in filter(Path.is_file, sorted(folder.glob(pattern))):
            found = re.match(words, file.read_text(encoding="utf-8", errors="replace"), re.DOTALL | re.MULTILINE)
            texts.append(found and found[1])
    return next((shorten(str(text), _LICENCE_WIDTH) for text in texts if text), None)


def read_manifest(file: Path) -> Manifest:
    """Read what a zip contains, and check that it contains nothing else; of an imported model, what its zip contained.

    Parameters
    ----------
    file : Path
        The zip, or the model folder.

    Raises
    ------
    UserError
        As `unpack`; or the manifest of the folder is damaged.
    """
    fix = "Export the model again."
    if file.is_dir() and (own := read_validated(file / MANIFEST, Manifest, "is no manifest of a model", fix)):
        return own
    with _open(file) as (_, manifest):
        return manifest


def unpack(file: Path, out: Path, *, replace: bool = False) -> Path:
    """Write the model folder in a zip. The first stage of a cascade is written next to it under its own name.

    Parameters
    ----------
    file : Path
        The zip, from any source.
    out : Path
        The new model folder.
    replace : bool
        Set existing models aside instead of refusing; nothing is deleted.

    Returns
    -------
    Path
        `out`, absolute.

    Raises
    ------
    UserError
        The file is no zip of a model, damaged, or of a newer nnlite; it contains other files than its manifest lists,
        links, or paths out of the folder; it is too large for nnlite or for the disk; the model names code; or
        a model exists already.
    """
    out = out.absolute()
    with _open(file) as (archive, manifest), ExitStack() as stack:
        sizes = {path: packed.size for path, packed in manifest.files.items()}
        _check_size(sizes, file, out)
        model, *stages = manifest.models
        if out.name in stages:
            raise UserError("is the name of the model's first stage", out, "Choose another.")
        targets = {model: out, **{name: out.with_name(name) for name in stages}}
        folders = {
            name: stack.enter_context(new_model_folder(path, replace, sum(sizes.values())))
            for name, path in targets.items()
        }
        for path, packed in manifest.files.items():
            name, _, part = path.partition("/")
            target = folders[name] / part
            target.parent.mkdir(exist_ok=True)
            with archive.open(path) as source, target.open("xb") as copy:
                shutil.copyfileobj(source, copy)
            with target.open("rb") as copy:
                if hashlib.file_digest(copy, "sha256").hexdigest() != packed.sha256:
                    raise UserError(f"{path} was changed: its checksum differs", file, "Get the file again.")
        for number, name in enumerate(manifest.models):
            _check_model(folders[name], manifest.models[number + 1 :], file)
        write_json(folders[model] / MANIFEST, manifest.model_dump(mode="json"))
    return out


@contextmanager
def _open_zip(file: Path) -> Iterator[ZipFile]:
    """Open a zip, and report damage that the block finds in it as one line."""
    if not file.is_file():
        raise UserError("no such file", file)
    try:
        with ZipFile(file) as archive:
            yield archive
    except (BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        raise UserError(f"is no zip file, or a damaged one ({error})", file, "Get it again.") from None


@contextmanager
def _open(file: Path) -> Iterator[tuple[ZipFile, Manifest]]:
    """Open a zip and check that it contains exactly what its manifest lists, parts of models and nothing else."""
    with _open_zip(file) as archive:
        sizes = Counter((entry.filename, entry.file_size) for entry in archive.infolist())
        if MANIFEST not in archive.namelist():
            raise UserError(f"is no model that nnlite exported (no {MANIFEST})", file)
        with understood(file / MANIFEST):
            size = archive.getinfo(MANIFEST).file_size
            if size > _JSON_LIMIT:
                raise ValueError(f"{size} bytes")
            values = json.loads(archive.read(MANIFEST))
            must_be_known(str(values["format"]), FORMAT, file)
            manifest = Manifest.model_validate(values)
        _check_names(manifest, file)
        listed = Counter({(MANIFEST, size): 1, **{(path, f.size): 1 for path, f in manifest.files.items()}})
        if differing := min((sizes - listed) + (listed - sizes), default=None):
            what = f"is not what its {MANIFEST} lists: {differing[0]!r:.80} differs; nothing was unpacked"
            raise UserError(what, file, "Get the file again.")
        kinds = {entry.filename: stat.S_IFMT(entry.external_attr >> 16) for entry in archive.infolist()}
        if odd := next((name for name, kind in kinds.items() if kind not in (0, stat.S_IFREG)), None):
            raise UserError(f"contains {odd!r:.80}, which is no plain file; nothing was unpacked", file)
        yield archive, manifest


def _check_names(manifest: Manifest, file: Path) -> None:
    """Refuse names that no folder can have, or that would be hidden, and paths of files that no model has."""
    for name in (manifest.dataset, *manifest.models):
        if not is_folder_name(name):
            raise UserError(f"{name!r:.80} is no name for a folder", file)
    for path in manifest.files:
        model, _, part = path.partition("/")
        if model not in manifest.models or not _PART.fullmatch(part):
            raise UserError(f"lists {path!r:.80}, which is no part of a model", file)
    if sorted(manifest.models) != sorted({path.partition("/")[0] for path in manifest.files}):
        raise UserError(f"lacks a model that its {MANIFEST} names", file)


def _check_size(sizes: Mapping[str, int], file: Path, out: Path) -> None:
    """Refuse more bytes than are allowed, than the disk has free, or than a file of this size can contain."""
    total, packed = sum(sizes.values()), file.stat().st_size
    parent = next(folder for folder in out.parents if folder.exists())
    if big := [path for path, size in sizes.items() if path.endswith(".json") and size > _JSON_LIMIT]:
        raise UserError(f"{big[0]} has {sizes[big[0]]} bytes, which is too large", file)
    if total > _RATIO * packed:
        raise UserError(f"would unpack {packed} bytes to {total}, as no model does", file, "Do not trust this file.")
    if total > LIMIT:
        raise UserError(f"would unpack to {in_units(total)}, {in_units(LIMIT)} are allowed", file)
    if total > (free := shutil.disk_usage(parent).free):
        raise UserError(f"would unpack to {in_units(total)}, {in_units(free)} are free in {parent}", file)


def _check_model(folder: Path, stages: Sequence[str], file: Path) -> None:
    """Refuse a model that cannot predict: plan or settings that this version cannot read, or code."""
    try:
        plan, run = read_model(folder)
        is_second = plan.configuration(run["configuration"]).previous_stage is not None
    except UserError as error:
        raise UserError(f"{folder.name}: {error.what}", file, error.fix) from None
    if (factory := Settings.model_validate(run["settings"]).network.factory) is not None:
        raise UserError(f"names code, {factory}; it was not run", file)
    if [run.get("previous")] * is_second != list(stages):
        raise UserError(f"lacks the first stage that {folder.name} needs, or contains another one", file)
