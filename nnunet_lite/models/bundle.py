"""A model in one zip file that describes itself: packed, and unpacked without trusting it.

model.zip
  manifest.json              format, version, licence, note on the training data, sha256 and size of every other file
  3d_fullres-default/        a model folder with what predicting needs: plans.json dataset.json run.json
    fold_0/model.safetensors
  3d_lowres-default/         of a cascade, the first stage

The zip contains no path of the machine, no case and no code. Unpacking refuses files that the manifest does not list,
anything but plain files of a model folder, wrong sizes, and code. Nothing appears before every checksum is right.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import gettempdir
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic, must_be_known, must_fit, read_json, scratch, write_json
from nnunet_lite.models.folder import FORMAT as MODEL_FORMAT
from nnunet_lite.models.folder import MODEL, is_finished, other_folds, set_aside, validation_dice
from nnunet_lite.models.lookup import Checkpoint, is_nnunet, read_model
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings
from nnunet_lite.system import in_units

FORMAT = "nnlite-bundle-1"
MANIFEST = "manifest.json"
LIMIT = 32 * 10**9  # bytes of an unpacked model
_JSON_LIMIT = 16 * 2**20  # bytes of a JSON file; a plan has 10 KB
_RATIO = 100  # weights shrink by a tenth; a file that grows by more than this factor is meant to fill the disk
_CHUNK = 2**20
_LONGEST_NAME = 80
_JSONS = ("plans.json", "dataset.json", "run.json")
_FOLD = re.compile(r"fold_(all|\d+)")
# the entries of dataset.json that are packed; nnU-Net's may list the cases and their files
_PUBLIC = ("name", "description", "reference", "licence", "license", "release", "channel_names", "modality", "labels",
           "regions_class_order", "file_ending", "numTraining")  # fmt: skip


class PackedFile(BaseModel):
    """Checksum and size (bytes) of a file."""

    model_config = ConfigDict(frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
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
        Configuration, channels, labels, and the mean Dice of each fold's held-out cases.
    licence : str, optional
        An SPDX identifier, or the text.
    training_data : str, optional
        A note on what the model was trained on.
    files : dict
        Path in the zip -> checksum and size, of all files but the manifest.
    """

    model_config = ConfigDict(frozen=True)

    format: str = FORMAT
    made_by: str
    dataset: str
    models: tuple[str, ...] = Field(min_length=1, max_length=2)
    about: dict[str, Any]
    licence: str | None = None
    training_data: str | None = None
    files: dict[str, PackedFile]


# ------------------------------------------------------------------------------------------------------------- packing


def pack(folder: Path, out: Path, *, licence: str | None = None, note: str | None = None) -> Manifest:
    """Write the trained folds of a model folder, and of a cascade's first stage, into a zip.

    Equal models make equal files, to the byte.

    Parameters
    ----------
    folder : Path
        The model folder.
    out : Path
        The zip to write.
    licence : str, optional
        An SPDX identifier such as "CC-BY-4.0", or the text. By default that of the zip from which it was imported.
    note : str, optional
        On the training data; the same default.

    Raises
    ------
    UserError
        There is no model folder, no trained fold or no first stage; the network is code; or `out` exists already.
    """
    if out.exists():
        raise UserError("exists already", out, "Choose another file, or delete it.")
    folder = folder.absolute()
    plan, run = read_model(folder)
    folders = [folder]
    if stage := plan.configuration(run["configuration"]).previous_stage:
        if not run.get("previous"):
            raise UserError(f"does not name its first stage, a model of {stage}", folder / "run.json")
        folders.append(folder.with_name(Path(run["previous"]).name))
    imported = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    files: dict[str, PackedFile] = {}
    with atomic(out) as temporary, ZipFile(temporary, "w") as archive:
        for model in folders:
            for name, content in _contents(model).items():
                files[f"{model.name}/{name}"] = _write(archive, f"{model.name}/{name}", content)
        manifest = Manifest(
            made_by=f"nnunet_lite {nnunet_lite.__version__}",
            dataset=plan.dataset,
            models=tuple(model.name for model in folders),
            about=_about(folder, plan, run),
            licence=licence or imported.get("licence"),
            training_data=note or imported.get("training_data"),
            files=files,
        )
        _check_names(manifest, folder)
        _write(archive, MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest


def read_licence(given: str) -> str:
    """Return an SPDX identifier or a text as it is, and the content of a file if `given` is the name of one."""
    is_file = len(given) < 256 and "\n" not in given and Path(given).is_file()
    return Path(given).read_text(encoding="utf-8") if is_file else given


def _contents(folder: Path) -> dict[str, bytes | Path]:
    """Return the files of a model folder that are packed, as bytes or as paths."""
    plan, run = read_model(folder)
    settings, weights = run["settings"], sorted(folder.glob(f"fold_*/{MODEL}"))
    if not weights:
        raise UserError("has no trained fold", folder, "Train one with `nnlite train`.")
    if (factory := settings["network"].get("factory")) is not None:
        fix = "Export it with --format onnx."
        raise UserError(f"has a network made by {factory}: code is not packed", folder, fix)
    if (start := settings["training"].get("init")) is not None:
        settings["training"]["init"] = Path(start).name
    run.pop("changed", None)  # the history of the run may name folders too
    dataset = {key: value for key, value in read_json(folder / "dataset.json").items() if key in _PUBLIC}
    values = {"plans.json": json.loads(plan.to_json()), "dataset.json": dataset, "run.json": run}
    texts = {name: f"{json.dumps(value, indent=1)}\n".encode() for name, value in values.items()}
    return {**texts, **{f"{file.parent.name}/{MODEL}": file for file in weights}}


def _about(folder: Path, plan: Plan, run: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a model for those who open the manifest."""
    folds = [name.removeprefix("fold_") for name in other_folds(folder, "") if is_finished(folder / name)]
    return {
        "configuration": run["configuration"],
        "recipe": run["settings"]["recipe"],
        "channels": [channel.name for channel in plan.channels],
        "labels": plan.labels.to_json(),
        "spacing": plan.configuration(run["configuration"]).spacing,
        "mean_dice": {fold: validation_dice(folder, fold) for fold in folds},
    }


def _write(archive: ZipFile, path: str, content: bytes | Path) -> PackedFile:
    """Add a file without date and owner. Weights are not compressed: they hardly shrink."""
    info = ZipInfo(path)
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.compress_type = ZIP_STORED if isinstance(content, Path) else ZIP_DEFLATED
    info.file_size = content.stat().st_size if isinstance(content, Path) else len(content)
    source = content.open("rb") if isinstance(content, Path) else BytesIO(content)
    with source, archive.open(info, "w") as target:
        return _copy(source, target, info.file_size)


def _copy(source: IO[bytes], target: IO[bytes], limit: int) -> PackedFile:
    """Copy a file until its end, or until `limit` bytes are exceeded, which are not written."""
    digest, size = hashlib.sha256(), 0
    while (chunk := source.read(_CHUNK)) and (size := size + len(chunk)) <= limit:
        digest.update(chunk)
        target.write(chunk)
    return PackedFile(sha256=digest.hexdigest(), size=size)


# ----------------------------------------------------------------------------------------------------------- unpacking


def is_bundle(path: Path) -> bool:
    """Whether a path is a zip file."""
    return path.is_file() and path.suffix.lower() == ".zip"


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield a model folder: the path itself, or a copy of what a zip contains, which is deleted after the block.

    Raises
    ------
    UserError
        As `unpack`.
    """
    if not is_bundle(path):
        yield path
        return
    with scratch(Path(gettempdir())) as temporary:
        yield unpack(path, temporary / read_manifest(path).models[0])


@contextmanager
def as_model_folder(path: Path, checkpoint: Checkpoint = "final") -> Iterator[Path]:
    """Yield a model folder of nnlite: as `unpacked`, and of a model of nnU-Net a copy too.

    Raises
    ------
    UserError
        It is no model; or another checkpoint than the final one is chosen of a model that nnU-Net did not write.
    """
    with unpacked(path) as folder:
        require_final(path, folder, checkpoint)
        if not is_nnunet(folder):
            yield folder
            return
        from nnunet_lite.models.nnunet import import_nnunet  # imports torch, which `nnlite info` needs only here

        with scratch(Path(gettempdir())) as temporary:
            copy = temporary / folder.absolute().name
            import_nnunet(folder, copy, checkpoint)
            yield copy


def require_final(path: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse a choice of checkpoint for a model of nnlite, which has only one; `folder` is what `path` contains."""
    if checkpoint != "final" and (folder / "run.json").is_file():
        what = f"has no {checkpoint} checkpoint: it is no model of nnU-Net"
        raise UserError(what, path, "Leave out --checkpoint.")


def read_manifest(file: Path) -> Manifest:
    """Read what a zip contains, and check that it contains nothing else.

    Raises
    ------
    UserError
        As `unpack`.
    """
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
    with _open(file) as (archive, manifest):
        _check_size(manifest, file, out)
        targets = _targets(manifest, out, replace)
        with scratch(out.parent) as temporary:
            with must_fit(out, temporary, sum(expected.size for expected in manifest.files.values())):
                for path, expected in manifest.files.items():
                    (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(path) as source, (temporary / path).open("xb") as target:
                        if _copy(source, target, expected.size) != expected:
                            raise UserError(f"{path} was changed: its checksum differs", file, "Get the file again.")
                for number, name in enumerate(manifest.models):
                    _check_model(temporary / name, manifest.models[number + 1 :], file)
                write_json(temporary / manifest.models[0] / MANIFEST, manifest.model_dump(mode="json"))
            for name, folder in reversed(targets.items()):  # the model itself is the last one
                if not _is_empty(folder) and (old := set_aside(folder)) is not None:
                    log.info(f"the previous model is kept in {old}")
                (temporary / name).replace(folder)
    return out


@contextmanager
def _open(file: Path) -> Iterator[tuple[ZipFile, Manifest]]:
    """Open a zip and check its list of files against its manifest."""
    if not file.is_file():
        raise UserError("no such file", file)
    try:
        with ZipFile(file) as archive:
            if MANIFEST not in archive.namelist() and any(name.endswith(".pth") for name in archive.namelist()):
                fix = "Unpack it, and import the model folder in it that contains plans.json."
                raise UserError("is a zip of nnU-Net, and not of `nnlite export`", file, fix)
            for info in archive.infolist():
                _check_entry(info, file)
            manifest = _read_manifest(archive, file)
            _check_names(manifest, file)
            _check_files(archive, manifest, file)
            yield archive, manifest
    except (BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"is no zip file, or a damaged one ({error})", file, "Get it again.") from None


def _check_entry(info: ZipInfo, file: Path) -> None:
    """Refuse an entry that is no plain file inside the folder that the zip is unpacked to."""
    name, kind = info.filename, info.external_attr >> 16
    parts = name.rstrip("/").split("/")
    if name != info.orig_filename or "\\" in name or ":" in parts[0] or any(p in ("", ".", "..") for p in parts):
        raise UserError(f"contains {info.orig_filename!r:.80}, a path out of its folder; nothing was unpacked", file)
    if info.is_dir() or stat.S_IFMT(kind) not in (0, stat.S_IFREG) or info.flag_bits & 1:
        raise UserError(f"contains {name!r:.80}, a folder, a link or encrypted; nothing was unpacked", file)


def _read_manifest(archive: ZipFile, file: Path) -> Manifest:
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


def _check_names(manifest: Manifest, file: Path) -> None:
    """Refuse names that no folder can have, or that would be hidden."""
    for name in (manifest.dataset, *manifest.models):
        odd = name.startswith(".") or not name.isprintable() or any(c in name for c in "\\:")
        if odd or len(name) > _LONGEST_NAME or Path(name).name != name:
            raise UserError(f"{name!r:.80} is no name for a folder", file)


def _check_files(archive: ZipFile, manifest: Manifest, file: Path) -> None:
    """Refuse a zip that contains anything but the files that its manifest lists, with these sizes."""
    for path in manifest.files:
        model, _, rest = path.partition("/")
        fold, _, weights = rest.partition("/")
        if model not in manifest.models or not (rest in _JSONS or (_FOLD.fullmatch(fold) and weights == MODEL)):
            raise UserError(f"lists {path!r:.80}, which is no part of a model", file)
    names = [info.filename for info in archive.infolist()]
    listed = {MANIFEST, *manifest.files}
    if odd := sorted({*names} ^ listed):
        fault = "lacks" if odd[0] in listed else "contains"
        raise UserError(f"{fault} {odd[0]!r:.80}, against its {MANIFEST}; nothing was unpacked", file)
    if len(names) > len(listed):
        raise UserError("contains a file twice", file)
    if sorted(manifest.models) != sorted({path.partition("/")[0] for path in manifest.files}):
        raise UserError(f"lacks a model that its {MANIFEST} names", file)
    for path, expected in manifest.files.items():
        if (size := archive.getinfo(path).file_size) != expected.size:
            raise UserError(f"{path} has {size} bytes, {expected.size} in its {MANIFEST}", file)


def _check_size(manifest: Manifest, file: Path, out: Path) -> None:
    """Refuse more bytes than are allowed, than the disk has free, or than a file of this size can contain."""
    sizes = {path: expected.size for path, expected in manifest.files.items()}
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
        must_be_known(str(run["format"]), MODEL_FORMAT, file)
        is_second = plan.configuration(run["configuration"]).previous_stage is not None
        settings = Settings.model_validate(run["settings"])
    except UserError as error:
        raise UserError(f"{folder.name}: {error.what}", file, error.fix) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder.name}/run.json cannot be read ({type(error).__name__})", file) from None
    if settings.network.factory is not None:
        raise UserError(f"names code, {settings.network.factory}; it was not run", file)
    if [run.get("previous")] * is_second != list(stages):
        raise UserError(f"lacks the first stage that {folder.name} needs, or contains another one", file)


def _targets(manifest: Manifest, out: Path, replace: bool) -> dict[str, Path]:
    """Return the new folder of each model."""
    model, *stages = manifest.models
    if out.name in stages:
        raise UserError("is the name of the model's first stage, which needs this folder", out, "Choose another.")
    targets = {model: out, **{name: out.with_name(name) for name in stages}}
    taken = [folder for folder in targets.values() if folder.exists() and not _is_empty(folder)]
    if taken and not replace:
        raise UserError("exists already", taken[0], "Choose another --output, or move it away.")
    return targets


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
