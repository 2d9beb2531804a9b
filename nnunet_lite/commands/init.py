"""`nnlite init`: write a dataset.json that lists the files which people have; none of them is copied."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.data.cases import Case, common_ending
from nnunet_lite.data.dataset import MASK_NOTE, channels_of, labels_in, labels_of, name_channels
from nnunet_lite.data.dicom import require_dicom
from nnunet_lite.data.discovery import NO_IMAGE, NO_MASK, Discovery, cases_by_name, cases_in_table, files_below
from nnunet_lite.data.names import PICTURES, stem
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError, no_such_file
from nnunet_lite.files import read_json, write_json
from nnunet_lite.system import expand_home
from nnunet_lite.workspace import RAW, workspace_folder

_CASES_SHOWN = 3
_MANY_LABELS = 20  # as instance masks have them


def init(
    data: Annotated[str | Path, typer.Argument(help="Folder of images and label maps, or a CSV file.")],
    *,
    image: Annotated[
        str | Sequence[str] | None,
        options.data(
            metavar="PATTERN", help="Which files are images; once for each channel.", show_default="all but label maps"
        ),
    ] = None,
    label: Annotated[
        str | Sequence[str] | None,
        options.data(
            metavar="PATTERN",
            help="Which files are label maps, or structures of DICOM masks.",
            show_default="names with mask, seg, label, ...",
        ),
    ] = None,
    output: Annotated[
        str | Path | None,
        options.output("-o", "--output", help="Folder of the dataset.", show_default="WORKSPACE/raw/NAME"),
    ] = None,
    workspace: options.Workspace = None,
) -> options.About:
    """Make a dataset of the files that you have, without copying them.

    It understands a folder for each patient, masks next to images or in a folder of their own, a CSV file with columns
    case, label and one for each channel, and DICOM series with DICOM-SEG or RTSTRUCT masks, of which label maps are
    written. The dataset is a dataset.json with the paths of the files. Called again, it updates the list of cases and
    keeps the names of labels and channels that you wrote there.

    Parameters
    ----------
    data : str or Path
        Folder of images and label maps, or a CSV file.
    image : str or sequence of str, optional
        Patterns of images, such as "*_t1.nii.gz", one for each channel; default: all files that are no label maps.
    label : str or sequence of str, optional
        Patterns of label maps, or of structures in DICOM masks; default: names with a word such as mask, seg or label.
    output : str or Path, optional
        Folder of the dataset; default: raw/NAME in the workspace.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    About
        What was found, what was left out, and the next command.

    Raises
    ------
    UserError
        It is not clear which files belong together, or the dataset.json that exists is for other files, channels or
        labels. Nothing is written.

    Examples
    --------
    nnlite init patients
    nnlite init scans --image '*_t1.nii.gz' --label '*_lesion.nii.gz'
    """
    source, place = expand_home(data).absolute(), workspace_folder(workspace)
    source = source.resolve() if ".." in source.parts else source
    name = source.stem if source.is_file() else source.name
    root = expand_home(output).absolute() if output else place / RAW / name
    then = f"nnlite plan {_for_shell(root)}" + (f" -w {_for_shell(place)}" if workspace else "")
    if not source.exists():
        raise no_such_file(source)
    if source.is_file() and source.suffix.lower() not in (".csv", ".tsv", ".txt"):
        raise UserError("is no folder and no CSV file", source, f"Run `nnlite init {_for_shell(source.parent)}`.")
    table = root / "dataset.json"
    existing = read_json(table) if table.is_file() else None
    if existing is None and (source / "dataset.json").is_file():
        raise UserError("is a dataset already", source, f"Run `nnlite plan {_for_shell(source)}`.")
    images, chosen = map(options.list_of, (image, label))
    files = None if source.is_file() else files_below(source, (place, root))
    if files is not None and files.masks:
        if existing is not None:  # the numbers of structures may be others now
            raise UserError("exists already, with label maps of DICOM masks", table, _again(then))
        require_dicom()
        from nnunet_lite.data.dicom_masks import convert_masks  # pydicom and highdicom

        found, labels, notes = convert_masks(files, root / "labels", chosen)
    else:
        found = cases_by_name(files, images, chosen) if files is not None else cases_in_table(source)
        known, value_map = labels_in([case.label for case in found.cases if case.label])
        labels, notes = known.to_json(), [MASK_NOTE] if value_map else []
    channels, ending = name_channels(found.cases, found.channels), common_ending(found.cases)
    content: dict[str, Any] = {
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": labels,
        "numTraining": len(found.cases),
        "file_ending": ending,
        "dataset": {
            case.id: {"images": [_relative(image, root) for image in case.images], "label": _relative(case.label, root)}
            for case in found.cases
        },
    }
    if files is not None and not files.dicom:  # to find new files, all DICOM headers would be read
        content["source"] = {"folder": str(source), "files": len(files.images)}
    changes: list[tuple[str, str]] = []
    if existing is not None:
        content, changes = _updated(existing, content, table, then)
    if ending not in PICTURES and "ct" not in (str(name).lower() for name in content["channel_names"].values()):
        notes.append("name a channel CT in dataset.json if it is one: it is normalised by its Hounsfield units")
    write_json(table, content)
    _warn_of_halves(found, source)
    others = [_relative(path, source) for path in files.others] if files else []
    left_out = {**found.left_out, "files of no supported format": others}
    left_out = {reason: names for reason, names in left_out.items() if names}
    values = {"path": str(root), **content, "notes": notes, "left_out": left_out, "next": then}
    return options.About(values, _summary(source, found.cases, values, changes), brief=str(table))


def _again(then: str) -> str:
    return f"Delete it to make it again, run `{then}` to use it, or give another --output."


def _updated(old: Any, new: dict[str, Any], table: Path, then: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the dataset.json that exists with the cases that there are now, and what changed.

    Names of channels and labels, which people write into it, stay.

    Raises
    ------
    UserError
        It is not of these files, or there are other channels or labels now.
    """
    before, after = old.get("dataset") if isinstance(old, dict) else None, new["dataset"]
    if not isinstance(before, dict) or not any(before.get(case) == files for case, files in after.items()):
        raise UserError("exists already, and lists other files", table, _again(then))
    labels = labels_of(old, table)
    unknown = {*labels_of(new, table).values} - {*labels.values, labels.ignore}
    if unknown or len(channels_of(old, table)) != len(channels_of(new, table)):
        what = f"label values {sorted(unknown)}" if unknown else f"channels {', '.join(new['channel_names'].values())}"
        raise UserError(f"exists already, and there are other {what} now", table, f"Add them there. {_again(then)}")
    changes = {
        "added": [case for case in after if case not in before],
        "removed": [case for case in before if case not in after],
        "changed": [case for case in after if before.get(case, after[case]) != after[case]],
    }
    lines = [(head, f"{len(names)}: {few(names, 9)}") for head, names in changes.items() if names]
    cases = {key: new[key] for key in ("numTraining", "file_ending", "dataset", "source") if key in new}
    kept = {key: value for key, value in old.items() if key != "source"}  # of files that may be counted no more
    return {**kept, **cases}, lines or [("unchanged", "the list of cases is the same as before")]


def _warn_of_halves(found: Discovery, source: Path) -> None:
    """Warn of images without label map and label maps without image, which are left out."""
    a_folder_each = len({case.label and case.label.parent for case in found.cases}) == len(found.cases) > 1
    for reason, lacks in ((NO_MASK, "no mask"), (NO_IMAGE, "no image")):
        if names := found.left_out.get(reason):
            n = len({Path(name).parent for name in names} if a_folder_each else names)
            what = f"{n} of {len(found.cases) + n} {'patients' if a_folder_each else 'cases'} left out"
            log.warn(f"{what}: {few(names)} {'has' if len(names) == 1 else 'have'} {lacks}")
    used = {(case.label.parent, stem(case.label)) for case in found.cases if case.label}
    alone = [source / name for name in found.left_out.get(NO_IMAGE, ())]
    if further := [path.name for path in alone if any((path.parent, begin) in used for begin in _begins(stem(path)))]:
        log.warn(
            f"{few(further)}: a further mask of a case, which is trained without it; merge its masks into one file"
        )


def _begins(name: str) -> list[str]:
    """Return what a name begins with, without cutting a number: x_mask of x_mask_1, but not mask1 of mask10."""
    return [name[:i] for i in range(1, len(name)) if not name[i].isdigit()]


def _summary(source: Path, cases: Sequence[Case], values: dict[str, Any], changes: list[tuple[str, str]]) -> str:
    """Return what was understood, as lines."""
    folder = source.parent if source.is_file() else source
    shown = [
        f"{case.id}: {', '.join(_relative(file, folder) for file in case.images)} with {_relative(case.label, folder)}"
        for case in cases[:_CASES_SHOWN]
    ]
    unnamed = [name for name in values["labels"] if re.fullmatch(r"label_\d+", name)]
    to_do = f"name the labels in {values['path']}/dataset.json before you plan"
    if len(unnamed) > _MANY_LABELS:
        cells = f"if these {len(unnamed)} values number cells, set them to 1, see docs/howto/microscopy.md"
        to_do = f"{cells}; otherwise {to_do}"
    rest = [f"and {plural(len(cases) - _CASES_SHOWN, 'more case')}"] if len(cases) > _CASES_SHOWN else []
    lines = [
        ("channels", few(list(values["channel_names"].values()), 9)),
        ("labels", few([f"{name} {value}" for name, value in values["labels"].items()], 9)),
        *(("cases", text) for text in [*shown, *rest]),
        *(("note", note) for note in values["notes"]),
        *(("left out", f"{reason}: {few(names, 9)}") for reason, names in values["left_out"].items()),
        *changes,
        ("written", f"{values['path']}/dataset.json"),
        *([("to do", to_do)] if unnamed else []),
        ("next", values["next"]),
    ]
    return "\n".join([f"{source.name}: {plural(len(cases), 'case')}", *(f"{head:<10}{text}" for head, text in lines)])


def _relative(path: Path | None, folder: Path) -> str:
    """Return a path relative to a folder if it is in it; empty for None."""
    return "" if path is None else (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _for_shell(path: Path) -> str:
    return shlex.quote(_relative(path, Path.cwd()))
