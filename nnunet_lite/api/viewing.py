"""The step that shows a case in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_lite import log
from nnunet_lite.api.place import Folder, current_paths, dataset_of
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import Paths, read_json

if TYPE_CHECKING:
    from nnunet_lite.data.dataset import Case, Dataset
    from nnunet_lite.reporting.viewer import View


def view(
    case: Folder,
    *segmentations: Folder,
    model: str | Sequence[str] | None = None,
    dataset: str | None = None,
    workspace: Folder | None = None,
) -> View:
    """Serve a page on 127.0.0.1 that shows a case: `.url`, until `.close()` or the end of the process.

    Parameters
    ----------
    case : of a planned dataset, by default the one planned last, which is shown with its reference and predictions;
        or an image file or DICOM series.
    segmentations : label maps of that file.
    model : names of model folders, or a+b for an ensemble, whose predictions in cross-validation are shown; default:
        what was selected, else the best trained one.
    dataset : of the case; of a file, whose label names to use.

    Raises
    ------
    UserError : there is no such case, file or prediction, or one cannot be read.
    """
    from nnunet_lite.reporting.viewer import read_case_scene, read_file_scene, serve

    file = Path(case)
    if file.exists() or segmentations:
        if model:
            raise UserError(
                "a model's predictions are shown of a case, not of a file", file, "Give label maps after it."
            )
        labels = dataset_of(current_paths(workspace, dataset, only_reads=True)).labels if dataset else None
        return serve(read_file_scene(file, [Path(path) for path in segmentations], labels))
    paths = current_paths(workspace, dataset, only_reads=True)
    found = _case_of(dataset_of(paths), str(case))
    names = [model] if isinstance(model, str) else model
    return serve(read_case_scene(dataset_of(paths), found, _predictions(paths, found, names)))


def _case_of(dataset: Dataset, name: str) -> Case:
    cases = {case.id: case for case in dataset.cases}
    if name not in cases:
        nearest = get_close_matches(name, cases, 3)
        fix = f"Did you mean {' or '.join(nearest)}?" if nearest else f"Its cases are {', '.join(list(cases)[:3])} ..."
        raise UserError(f"there is no file {name}, and no case of that name in {dataset.name}", fix=fix)
    return cases[name]


def _predictions(paths: Paths, case: Case, names: Sequence[str] | None) -> list[tuple[str, Path]]:
    """Name and label map of what models predict of a case that they did not see; those that were asked for must be."""
    from nnunet_lite.inference.folder import output_file

    found = []
    for name in _chosen(paths) if names is None else names:
        folder = paths.root / "ensembles" / name if "+" in name else paths.models / name
        maps = (output_file(case, fold / "validation") for fold in sorted(folder.glob("fold_*")))
        if file := next((path for path in maps if path.is_file()), None):
            found.append((f"{name}, {file.parent.parent.name.replace('_', ' ')}", file))
        elif names is None:
            log.info(f"{name} has not predicted {case.id}: the fold that holds it out is not trained")
        elif not folder.is_dir():
            have = sorted(path.name for path in (*paths.models.glob("*"), *(paths.root / "ensembles").glob("*")))
            raise UserError("there is no such model", folder, f"There are: {', '.join(have) or 'none'}.")
        else:
            raise UserError(f"has not predicted {case.id}: the fold that holds it out is not trained", folder)
    return found


def _chosen(paths: Paths) -> list[str]:
    """The selected model or ensemble, else the best trained model, if there is one."""
    from nnunet_lite.models.choice import choose_model
    from nnunet_lite.models.folder import model_folders, trained_folds

    if (paths.root / "inference.json").is_file():
        return ["+".join(read_json(paths.root / "inference.json")["models"])]
    return [choose_model(paths).name] if any(map(trained_folds, model_folders(paths))) else []
