"""A model in one zip file that describes itself.

model.zip
  manifest.json              format, version, licence, note on the training data, sha256 and size of every other file
  3d_fullres-default/        a model folder with what predicting needs: plans.json dataset.json run.json
    fold_0/model.safetensors
  3d_lowres-default/         of a cascade, its first stage beside it

No path of the machine and no case is in it, and nothing to run. unpack.py reads it.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from pydantic import BaseModel, ConfigDict, Field

import nnunet_lite
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic, read_json
from nnunet_lite.inference.predictor import read_model
from nnunet_lite.models.folder import MODEL, is_finished, other_folds, validation_dice
from nnunet_lite.planning.schema import Plan

FORMAT = "nnlite-bundle-1"
MANIFEST = "manifest.json"
_LONGEST_NAME = 80
_SAYS_NOTHING = ("model", "models")  # what a folder or a zip file may be called that holds any model
CHUNK = 2**20
# of a dataset.json: nnU-Net's may list the cases and their files
_TRAVELS = ("name", "description", "reference", "licence", "license", "release", "channel_names", "modality", "labels",
            "regions_class_order", "file_ending", "numTraining")  # fmt: skip


class File(BaseModel):
    """Checksum and size (bytes) of a file."""

    model_config = ConfigDict(frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """What a zip holds.

    Parameters
    ----------
    made_by : the version of nnlite that wrote it.
    dataset : the name of the data set that the model was trained on.
    models : folder names: the model, then its first stage if it has one.
    about : configuration, channels, labels, and the mean Dice of each fold's held-out cases.
    licence : an SPDX identifier, or the text. training_data : a note on what the model was trained on.
    files : path in the zip -> checksum and size, of all files but this one.
    """

    model_config = ConfigDict(frozen=True)

    format: str = FORMAT
    made_by: str
    dataset: str
    models: tuple[str, ...] = Field(min_length=1, max_length=2)
    about: dict[str, Any]
    licence: str | None = None
    training_data: str | None = None
    files: dict[str, File]

    def name_for(self, file: Path) -> str:
        """What to call the model of a zip file: as it was called, or as the file, unless that says nothing."""
        of_kind = f"{self.about.get('configuration')}-{self.about.get('recipe')}"
        return next(name for name in (self.models[0], file.stem, of_kind) if name.lower() not in _SAYS_NOTHING)


def pack(folder: Path, out: Path, *, licence: str | None = None, note: str | None = None) -> Manifest:
    """Write the trained folds of a model folder, and of a cascade's first stage, into a zip. Equal models: equal bytes.

    Parameters
    ----------
    licence : an SPDX identifier such as "CC-BY-4.0", or the text. note : on the training data. By default those that
        the model came with, if it was imported from a zip.

    Raises
    ------
    UserError : no model folder, no trained fold, no first stage, a network made by the user's own code, or `out` is
        there already.
    """
    if out.exists():
        raise UserError("is there already", out, "Choose another file, or delete it.")
    folder = folder.absolute()
    plan, run = read_model(folder)
    folders = [folder, *_first_stage(folder, plan, run)]
    came_with = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    files: dict[str, File] = {}
    with atomic(out) as temporary, ZipFile(temporary, "w") as archive:
        for model in folders:
            for name, content in _contents(model).items():
                path = f"{model.name}/{name}"
                files[path] = _write(archive, path, content)
        manifest = Manifest(
            made_by=f"nnunet_lite {nnunet_lite.__version__}",
            dataset=plan.dataset,
            models=tuple(model.name for model in folders),
            about=_about(folder, plan, run),
            licence=licence or came_with.get("licence"),
            training_data=note or came_with.get("training_data"),
            files=files,
        )
        for name in (manifest.dataset, *manifest.models):
            must_be_name(name, folder)
        _write(archive, MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest


def licence_text(given: str) -> str:
    """An SPDX identifier or a text as it is; of the name of a file, what it says."""
    is_file = len(given) < 256 and "\n" not in given and Path(given).is_file()
    return Path(given).read_text(encoding="utf-8") if is_file else given


def _first_stage(folder: Path, plan: Plan, run: Mapping[str, Any]) -> list[Path]:
    """The folder of a cascade's first stage, if it is a cascade."""
    stage = plan.configuration(run["configuration"]).previous_stage
    if stage is None:
        return []
    if not run.get("previous"):
        raise UserError(f"does not say which model of {stage} predicts before it", folder / "run.json")
    return [folder.with_name(Path(run["previous"]).name)]


def _contents(folder: Path) -> dict[str, bytes | Path]:
    """The files of a model folder that travel, as bytes or where they lie."""
    plan, run = read_model(folder)
    settings, weights = run["settings"], sorted(folder.glob(f"fold_*/{MODEL}"))
    if not weights:
        raise UserError("has no trained fold", folder, "Train one with `nnlite train`.")
    if (factory := settings["network"].get("factory")) is not None:
        raise UserError(f"has a network made by {factory}, which cannot travel: it is code", folder,
                        "Export it with --format onnx.")  # fmt: skip
    if (start := settings["training"].get("init")) is not None:
        settings["training"]["init"] = Path(start).name
    run.pop("changed", None)  # the history of the run may name folders too
    dataset = {key: value for key, value in read_json(folder / "dataset.json").items() if key in _TRAVELS}
    values = {"plans.json": json.loads(plan.to_json()), "dataset.json": dataset, "run.json": run}
    texts = {name: f"{json.dumps(value, indent=1)}\n".encode() for name, value in values.items()}
    return {**texts, **{f"{file.parent.name}/{MODEL}": file for file in weights}}


def _about(folder: Path, plan: Plan, run: Mapping[str, Any]) -> dict[str, Any]:
    """A description for whoever opens the manifest."""

    folds = [name.removeprefix("fold_") for name in other_folds(folder, "") if is_finished(folder / name)]
    return {
        "configuration": run["configuration"],
        "recipe": run["settings"]["recipe"],
        "channels": [channel.name for channel in plan.channels],
        "labels": plan.labels.to_json(),
        "spacing": plan.configuration(run["configuration"]).spacing,
        "mean_dice": {fold: validation_dice(folder, fold) for fold in folds},
    }


def _write(archive: ZipFile, path: str, content: bytes | Path) -> File:
    """Add a file without date and owner; weights uncompressed, for they hardly shrink."""
    info = ZipInfo(path)
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.compress_type = ZIP_STORED if isinstance(content, Path) else ZIP_DEFLATED
    info.file_size = content.stat().st_size if isinstance(content, Path) else len(content)
    digest, size = hashlib.sha256(), 0
    with archive.open(info, "w") as target:
        for chunk in _chunks(content):
            target.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return File(sha256=digest.hexdigest(), size=size)


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def must_be_name(name: str, file: Path) -> None:
    """Refuse what cannot be the name of a folder, or would be hidden."""
    odd = name.startswith(".") or not name.isprintable() or any(c in name for c in "\\:") or len(name) > _LONGEST_NAME
    if odd or Path(name).name != name:
        raise UserError(f"{name!r:.80} is no name for a folder", file)
