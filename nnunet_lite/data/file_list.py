"""Problems of a dataset's list of files: the number of cases, files that no case uses, ids that occur twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nnunet_lite.data.cases import image_files
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.images import stem
from nnunet_lite.data.pairing import LABEL_FOLDERS, advice, label_base, likely_pairs
from nnunet_lite.data.problems import Problem, plural
from nnunet_lite.files import read_json
from nnunet_lite.workspace import IMAGE_FOLDERS


def check_files(dataset: Dataset) -> Iterator[Problem]:
    """All problems that names show, without reading an image."""
    yield from _number_of_cases(dataset)
    yield from _files_without_case(dataset)
    yield from _repeated_ids(dataset)


def _number_of_cases(dataset: Dataset) -> Iterator[Problem]:
    """Cases that dataset.json counts (numTraining) and that are not there, or the reverse."""
    table = dataset.root / "dataset.json"
    declared = read_json(table).get("numTraining") if table.is_file() else None
    if isinstance(declared, int) and declared != len(dataset.cases):
        fix = "Add the files that are missing, or correct numTraining."
        text = f"numTraining is {declared}, and there are {plural(len(dataset.cases), 'case')}"
        yield Problem("n_cases", str(table), text, "", fix)


def _files_without_case(dataset: Dataset) -> Iterator[Problem]:
    """Files in the dataset's folders that no case uses; a dataset that lists its files may leave some out."""
    if dataset.layout == "explicit":
        return
    ids = {case.id for case in dataset.cases}
    labels = {case.id: case.label for case in dataset.cases if case.label}
    used = {path for case in dataset.cases for path in (*case.images, case.label)}
    images = _unused(dataset.root, {case.images[0].parent for case in dataset.cases}, IMAGE_FOLDERS, used)
    maps = _unused(dataset.root, {path.parent for path in labels.values()}, LABEL_FOLDERS, used)
    unlisted: set[str] = set()
    for path in images:
        case_id, _, number = stem(path).rpartition("_")
        if dataset.layout == "nnunet_v2" and not path.name.lower().endswith(dataset.file_ending.lower()):
            unlisted |= {stem(path), case_id}
            text = f"does not end with {dataset.file_ending}, and is left out"
            yield Problem("extra_image", str(path), text, "", "Convert it, or remove it.")
        elif case_id in ids and number.isdigit():
            found = f"a file for channel {int(number)} of case {case_id}"
            wanted = f"{plural(len(dataset.channels), 'channel')} ({', '.join(dataset.channels)})"
            fix = "Name the channel in dataset.json, or remove the file."
            yield Problem("extra_channel", str(path), found, wanted, fix)
        else:
            unlisted |= {stem(path), case_id}
            fix = "List it in dataset.json, or remove it."
            yield Problem("extra_image", str(path), "is not in the dataset", "", fix)
    pairs = likely_pairs([c.images[0] for c in dataset.cases if not c.label or not c.label.exists()], maps)
    for path in maps:
        owner = next((name for name in (stem(path), label_base(stem(path))) if name in labels), None)
        if owner is not None:
            listed = dataset.layout in ("msd", "nnunet_v1")
            if not listed and (stem(path) == owner) == (stem(labels[owner]) == owner):
                found = f"could be the label map of case {owner}, and {labels[owner].name} is taken"
                yield Problem("ambiguous_label", str(path), found, "one label map", "Remove one of the two.")
            else:
                found = f"is not used: {labels[owner].name} is the label map of case {owner}"
                yield Problem("extra_label", str(path), found, "", "Remove it if it is not needed.")
        elif stem(path) not in unlisted:
            fix = f"{advice(path, pairs[path])} " if path in pairs else ""
            fix += "Else add its image, or remove it." if fix else "Add the image, or remove it."
            yield Problem("extra_label", str(path), "a label map without an image", "", fix)


def _unused(root: Path, folders: set[Path], usual: Sequence[str], used: set[Path | None]) -> list[Path]:
    """The files in the usual ones of some folders that no case uses."""
    usual_ones = sorted(f for f in folders if f.parent == root and f.name.lower() in usual and f.is_dir())
    return [path for folder in usual_ones for path in image_files(folder) if path not in used]


def _repeated_ids(dataset: Dataset) -> Iterator[Problem]:
    for case_id, n in Counter(case.id for case in dataset.cases).items():
        if n > 1:
            files = [case.images[0] for case in dataset.cases if case.id == case_id]
            text = f"{n} cases have the id {case_id} ({', '.join(sorted({path.name for path in files}))})"
            yield Problem("duplicate_id", str(files[0]), text, "one", "Rename or remove one.")
