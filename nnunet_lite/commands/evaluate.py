"""`nnlite evaluate` and `nnlite select`: score label maps, and choose the model that `nnlite predict` uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nnunet_lite.commands.options import AcceptGeometry, DatasetName, Device, FilePath, Workers, Workspace, names_of
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.evaluation.comparison import select_models
from nnunet_lite.evaluation.scores import Scores, score_files
from nnunet_lite.evaluation.selection import Selection
from nnunet_lite.files import write_json, write_text
from nnunet_lite.workspace import select_dataset


def evaluate(
    prediction: Annotated[FilePath, typer.Argument(help="Label map, or folder of label maps.")],
    reference: Annotated[FilePath, typer.Argument(help="Its reference, or their folder.")],
    *,
    tolerance: Annotated[float, typer.Option(help="Of the surface Dice, in mm; in pixels without a spacing.")] = 1.0,
    surface: Annotated[bool, typer.Option(help="Surface distances too.")] = True,
    accept_geometry: AcceptGeometry = False,
    output: Annotated[
        FilePath | None, typer.Option(help="Write JSON (.json) or one row per case and label (.csv).")
    ] = None,
    workers: Workers = None,
) -> Scores:
    """Score label maps against references: Dice, surface distances, volumes, lesions.

    Files of two folders are matched by name.

    Returns
    -------
    Scores
        The metrics of each case and label, and their means.

    Raises
    ------
    UserError
        No names match, a pair has two grids, or a file cannot be read.
    """
    scores = score_files(
        Path(prediction), Path(reference), tolerance_mm=tolerance, surface=surface, workers=workers,
        accept_geometry=accept_geometry,
    )  # fmt: skip
    if output is not None and Path(output).suffix == ".csv":
        write_text(Path(output), scores.to_csv())
    elif output is not None:
        write_json(Path(output), scores.to_json())
    return scores


def select(
    configuration: Annotated[
        str | Sequence[str] | None,
        typer.Option("-c", "--configuration", help="2d, 3d_fullres, ..., or a model's name; may be repeated [all]."),
    ] = None,
    *,
    ensembles: Annotated[bool, typer.Option("--ensembles/--no-ensembles", help="Try all pairs.")] = True,
    postprocess: Annotated[
        bool, typer.Option("--postprocess/--no-postprocess", help="Try rules for components.")
    ] = True,
    device: Device = None,
    workers: Workers = None,
    dataset: DatasetName = None,
    workspace: Workspace = None,
) -> Selection:
    """Compare trained models and pairs of them on the held-out cases; predict uses the best.

    Predictions of held-out cases that are missing are made first. Writes inference.json.

    Returns
    -------
    Selection
        The selected models and the scores of all candidates.

    Raises
    ------
    UserError
        No trained models can be compared, or a case cannot be predicted.
    """
    paths = select_dataset(workspace, dataset)
    return select_models(
        paths, stored_dataset(paths.dataset), names_of(configuration), ensembles=ensembles, postprocess=postprocess,
        device=device, workers=workers,
    )  # fmt: skip
