"""Commands that tell what there is and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnunet_lite import api, log
from nnunet_lite.commands.options import (
    AcceptGeometry,
    AsJson,
    Checkpoint,
    Dataset,
    Device,
    Epoch,
    Workers,
    Workspace,
    only_one,
    show,
)


def evaluate(
    prediction: Annotated[Path, typer.Argument(help="Label map, or folder of label maps.")],
    reference: Annotated[Path, typer.Argument(help="Its reference, or their folder.")],
    tolerance: Annotated[float, typer.Option(help="Of the surface Dice, in mm; in pixels without a spacing.")] = 1.0,
    surface: Annotated[bool, typer.Option(help="Surface distances too.")] = True,
    accept_geometry: AcceptGeometry = False,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON (.json) or one row per case and label (.csv).")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Score label maps against references: Dice, surface distances, volumes, lesions."""
    from nnunet_lite.workspace import write_json, write_text

    scores = api.evaluate(
        prediction, reference, tolerance_mm=tolerance, surface=surface, accept_geometry=accept_geometry,
        workers=workers,
    )  # fmt: skip
    if output is not None and output.suffix == ".csv":
        write_text(output, scores.to_csv())
    elif output is not None:
        write_json(output, scores.to_json())
    show(scores.to_json(), scores.table(), as_json)


def select(
    configuration: Annotated[
        list[str] | None,
        typer.Option("-c", "--configuration", help="2d, 3d_fullres, ..., or a model's name; may be repeated [all]."),
    ] = None,
    ensembles: Annotated[bool, typer.Option("--ensembles/--no-ensembles", help="Try all pairs.")] = True,
    postprocess: Annotated[
        bool, typer.Option("--postprocess/--no-postprocess", help="Try rules for components.")
    ] = True,
    device: Device = None,
    workers: Workers = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Compare what is trained, and pairs of it, on the held-out cases; predict obeys."""
    found = api.select(
        configuration or None, ensembles=ensembles, postprocess=postprocess, device=device, workers=workers,
        dataset=dataset, workspace=workspace,
    )  # fmt: skip
    show(found.to_json(), found.table(), as_json)


def report(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write [report.html in the data set's folder].")
    ] = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """One HTML page about the data set, its plan, models and scores, with pictures of the worst cases."""
    page = api.report(output, dataset=dataset, workspace=workspace)
    show({"report": str(page), "bytes": page.stat().st_size}, str(page), as_json)


def info(
    model: Annotated[
        Path | None, typer.Argument(help="Model folder, nnU-Net's too, or zip [all models of a planned dataset].")
    ] = None,
    option: Annotated[Path | None, typer.Option("-m", "--model", help="The same, as for `nnlite predict`.")] = None,
    checkpoint: Checkpoint = Epoch.final,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """What a model is, how it was made and how well it scores; or what a planned dataset has."""
    from nnunet_lite.describe import describe_dataset, describe_model
    from nnunet_lite.models.choice import model_at
    from nnunet_lite.workspace import workspace_folder

    if (given := only_one(model, option)) is not None:
        about = describe_model(model_at(given, workspace_folder(workspace), dataset), checkpoint.value)
    else:
        about = describe_dataset(api.current_paths(workspace, dataset, only_reads=True, needs_plan=False))
    show(about.values, about.text, as_json)


def doctor(as_json: AsJson = False, workspace: Workspace = None) -> None:
    """What this machine has: versions, CPUs, memory, GPUs, disk; and what is wrong with it."""
    from nnunet_lite.describe import describe_machine
    from nnunet_lite.workspace import workspace_folder

    about = describe_machine(workspace_folder(workspace))
    show(about.values, about.text, as_json)
    raise typer.Exit(1 if about.values["problems"] else 0)


def view(
    case: Annotated[str, typer.Argument(help="Case of the data set, or an image file or DICOM series.")],
    segmentations: Annotated[list[Path] | None, typer.Argument(help="Label maps of that file.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("-m", "--model", help="Whose cross-validation to show, a+b for an ensemble [the selected]."),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page; else only its address is printed.")] = True,
    dataset: Dataset = None,
    workspace: Workspace = None,
) -> None:
    """Look at an image with reference and prediction in the browser."""
    import signal
    import threading

    from nnunet_lite.reporting.viewer import open_browser

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    with api.view(case, *segmentations or (), model=model or None, dataset=dataset, workspace=workspace) as shown:
        try:
            log.answer(shown.url)
            log.info(f"{shown.title}: readable on this machine alone, until Ctrl-C")
            if browser and not open_browser(shown):
                log.info("no browser with windows was found; open the address above in one")
            threading.Event().wait()
        except KeyboardInterrupt:
            log.info("closed")
