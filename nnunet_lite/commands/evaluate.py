"""`nnlite evaluate`: score label maps against their references."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnunet_lite.commands.options import AcceptGeometry, FilePath, Workers
from nnunet_lite.evaluation.scores import Scores, score_files
from nnunet_lite.files import write_json, write_text


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

    Parameters
    ----------
    prediction, reference : str or Path
        Two label maps, or two folders of label maps.
    tolerance : float
        How far apart surfaces may be for the surface Dice, in mm, or in pixels if no file has a spacing.
    surface : bool
        Whether to measure surface distances.
    output : str or Path, optional
        A .json or .csv file to write the scores to.

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
