"""The `nnlite` command: one thin function per command; the steps themselves are in api.py.

Everything heavy is imported inside the functions, so that `nnlite --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnunet_lite import __version__, api, log
from nnunet_lite.errors import Stopped, UserError

if TYPE_CHECKING:
    from nnunet_lite.plan.schema import Plan

app = typer.Typer(
    name="nnlite",
    help="Self-configuring medical image segmentation: plan, train, predict.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Preset(StrEnum):
    default = "default"
    resenc_m = "resenc_m"
    resenc_l = "resenc_l"
    resenc_xl = "resenc_xl"


class Stored(StrEnum):
    float16 = "float16"
    float32 = "float32"


class Format(StrEnum):
    nnlite = "nnlite"
    nnunet = "nnunet"


class ModelFormat(StrEnum):
    zip = "zip"
    onnx = "onnx"
    nnunet = "nnunet"


class Speed(StrEnum):
    fast = "fast"
    balanced = "balanced"
    best = "best"


_PROBABILITIES = "--save-probabilities"

Workspace = Annotated[
    Path | None,
    typer.Option("-w", "--workspace", help="Folder that holds everything [$NNLITE_WORKSPACE or ./nnlite_workspace]."),
]
Dataset = Annotated[str | None, typer.Option("-d", "--dataset", help="Planned data set [the one planned last].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [a GPU if there is one].")]
Workers = Annotated[int | None, typer.Option(min=0, help="Threads; 0: none, everything in line [as fits the machine].")]
SetOptions = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; may be repeated.")
]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")]
Folds = Annotated[int | None, typer.Option("--folds", min=2, metavar="N", help="How many [5].")]
GroupBy = Annotated[
    str | None,
    typer.Option(metavar="REGEX|CSV", help="Cases of a group, such as a patient, are never on both sides of a fold."),
]
Stratify = Annotated[bool, typer.Option("--stratify", help="Folds alike in which labels occur, and their volume.")]
StratifyBy = Annotated[Path | None, typer.Option(metavar="CSV", help="Folds alike in this: columns case, stratum.")]
Splits = Annotated[
    Path | None, typer.Option(help="Folds to use: splits.json, splits_final.json or a CSV with columns case, fold.")
]


# what an OSError of these kinds says is the user's to mend; any other one is a failure of the machine
_INTERRUPTED = 130
_MISPLACED = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


def main() -> None:
    """Run a command: exit code 0, 1 for a failure, 2 for a mistake of the user's (one line, no traceback)."""
    try:
        code = app(_spelled_out(sys.argv[1:]) or ["--help"], prog_name="nnlite", standalone_mode=False)
        if code == _INTERRUPTED:  # typer keeps the KeyboardInterrupt to itself
            raise KeyboardInterrupt
        sys.exit(code)
    except UserError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except Stopped as stopped:
        sys.exit(_fail(str(stopped), 128 + stopped.number))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_fail("stopped; the same command goes on from here (predict: with --continue)", _INTERRUPTED))
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone
        sys.exit(1)
    except OSError as error:
        sys.exit(
            _fail(f"error: {error.filename or 'system'}: {error.strerror or error}.", 1 + isinstance(error, _MISPLACED))
        )
    except Exception as error:
        # typer's complaints about options come from its own copy of click, whose classes have no public name
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "nnlite")
        sys.exit(_fail(f"error: {error.format_message().rstrip('.?')}. See `{command} --help`.", 2))


def _spelled_out(arguments: list[str]) -> list[str]:
    """`--save-probabilities` without labels means all of them; typer knows no optional values."""
    following = [*arguments[1:], "-"]
    out = []
    for argument, after in zip(arguments, following, strict=True):
        out += [argument, "all"] if argument == _PROBABILITIES and after.startswith("-") else [argument]
    return out


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)  # a silent process too says what it ended of
    return code


def _show(result: Any, text: str, as_json: bool) -> None:
    print(json.dumps(result, indent=1) if as_json else text)


def _changes(given: dict[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    """Flags that were set, then --set key=value, as changes of settings."""
    changes = {key: value for key, value in given.items() if value is not None}
    for assignment in assignments or []:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r} is not key=value")
        changes[key.strip()] = value.strip()
    return changes


def _numbers(text: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", " ").replace(",", " ").split())
    except ValueError:
        raise UserError(f"{what} {text!r} is not a list of whole numbers", fix="Write 40x56x40 or 40,56,40.") from None


@app.command()
def check(data: str, workers: Workers = None, as_json: AsJson = False, workspace: Workspace = None) -> None:
    """Report every problem of a data set at once."""
    report = api.check(data, workspace=workspace, workers=workers)
    _show(report.to_json(), report.to_text(), as_json)
    raise typer.Exit(0 if report.ok else 2)


@app.command()
def plan(
    data: Annotated[str | None, typer.Argument(help="Folder of the raw data, or its name.")] = None,
    preset: Annotated[Preset, typer.Option(help="Kind of U-Net.")] = Preset.default,
    memory: Annotated[float | None, typer.Option(help="GPU memory budget in GB [the preset's: 8, 8, 24, 40].")] = None,
    plans: Annotated[Path | None, typer.Option(help="Adopt this plans.json, ours or nnU-Net's.")] = None,
    patch_size: Annotated[str | None, typer.Option(help="Such as 40x56x40, instead of the planned one.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the planned one.")] = None,
    configuration: Annotated[
        str | None, typer.Option("-c", "--configuration", help="That gets them [3d_fullres, or 2d for a flat patch].")
    ] = None,
    clip: Annotated[
        tuple[float, float] | None,
        typer.Option("--clip-percentiles", min=0, max=100, help="Clip each image to these before normalisation."),
    ] = None,
    folds: Folds = None,
    group_by: GroupBy = None,
    stratify: Stratify = False,
    stratify_by: StratifyBy = None,
    splits: Splits = None,
    store: Annotated[Stored, typer.Option(help="Type of preprocessed images on disk.")] = Stored.float16,
    measure: Annotated[
        bool, typer.Option("--measure", help="Compare with the memory of real steps on the GPU.")
    ] = False,
    device: Device = None,
    from_fingerprint: Annotated[Path | None, typer.Option(help="Plan from a fingerprint instead of data.")] = None,
    dataset_json: Annotated[Path | None, typer.Option(help="dataset.json, with --from-fingerprint.")] = None,
    format: Annotated[Format, typer.Option(help="Of --output.")] = Format.nnlite,
    output: Annotated[Path | None, typer.Option(help="Write the plan to this file too.")] = None,
    workers: Workers = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Check a data set, take its fingerprint and plan its networks."""
    from nnunet_lite.plan.show import plan_table
    from nnunet_lite.workspace import write_json

    patch = None if patch_size is None else _numbers(patch_size, "--patch-size")
    change = (configuration or ("2d" if patch and len(patch) == 2 else "3d_fullres"), patch, batch_size)
    about: dict[str, Any] | None = None
    if from_fingerprint is not None:
        if dataset_json is None:
            raise UserError("--from-fingerprint needs --dataset-json")
        made, about = api.plan_from_fingerprint(
            from_fingerprint, dataset_json, preset=preset, memory=memory, change=change
        )
    elif data is not None:
        made = api.plan(
            data, workspace=workspace, preset=preset, memory=memory, adopt=plans, change=change,
            clip_percentiles=clip, stored_as=store.value, folds=folds, group_by=group_by,
            stratify=stratify_by or stratify, splits=splits, workers=workers,
        )  # fmt: skip
    else:
        raise UserError("name the data set to plan", fix="For example `nnlite plan Task04_Hippocampus`.")
    if output is not None:
        write_json(output, _formatted(made, about, format))
    _show(made.model_dump(mode="json"), plan_table(made), as_json)
    if measure:
        log.info(api.measure(made, device))


def _formatted(made: Plan, about: dict[str, Any] | None, format: Format) -> Any:
    """A plan as JSON, ours or nnU-Net's, which also wants the dataset.json."""
    if format is Format.nnlite:
        return made.model_dump(mode="json")
    from nnunet_lite.interop.nnunet import Description, description_to_nnunet, plan_to_nnunet

    names = tuple(channel.name for channel in made.channels)
    return plan_to_nnunet(
        made, about or description_to_nnunet(Description(names, made.labels, made.n_cases, ".nii.gz"))
    )


@app.command()
def preprocess(
    configuration: Annotated[list[str] | None, typer.Argument(help="Which [all of the plan].")] = None,
    dataset: Dataset = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete what the plan does not need any more.")] = False,
    workers: Workers = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Crop, normalise and resample the current data set (train does it too where it is missing)."""
    summary = api.preprocess(configuration, dataset=dataset, clean=prune, workspace=workspace, workers=workers)
    _show(summary.to_json(), summary.to_text(), as_json)


@app.command()
def train(
    configuration: Annotated[str, typer.Argument(help="2d, 3d_fullres, ...")],
    fold: Annotated[str, typer.Argument(help='0 to 4, "all-folds" for each of them, "all" to train on every case.')],
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a TOML file.")] = "default",
    epochs: Annotated[int | None, typer.Option(help="Length of the run [the recipe's, as all that follows].")] = None,
    iterations: Annotated[int | None, typer.Option(help="Per epoch.")] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="Such as 8h or 90m (plain: minutes); the schedule fits itself to it.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Patches per step.")] = None,
    patch_size: Annotated[str | None, typer.Option(help="Such as 40x56x40.")] = None,
    lr: Annotated[float | None, typer.Option(help="Initial learning rate.")] = None,
    precision: Precision = None,
    seed: Annotated[int | None, typer.Option(help="Makes two runs identical on the CPU.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Threads that prepare batches ahead; 0: none.")] = None,
    cache: Annotated[str | None, typer.Option(help="Where cases lie: auto, device, ram or disk.")] = None,
    init: Annotated[str | None, typer.Option(help="Model folder to start from: fine-tuning.")] = None,
    freeze: Annotated[str | None, typer.Option(help="Weights that stay: encoder or all-but-head.")] = None,
    folds: Folds = None,
    group_by: GroupBy = None,
    stratify: Stratify = False,
    stratify_by: StratifyBy = None,
    splits: Splits = None,
    gpus: Annotated[int, typer.Option(min=1, help="Train on so many GPUs of this machine.")] = 1,
    device: Device = None,
    name: Annotated[str | None, typer.Option(help="Of the model folder [CONFIGURATION-RECIPE].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only go on; an error if nothing was begun.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although settings were changed.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; what is there is moved aside.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Draw augmented samples to preview.png first.")] = False,
    assignments: SetOptions = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Train a fold and score its held-out cases. The same command again goes on where it stopped."""
    if gpus > 1:
        from nnunet_lite.training.distributed import current, launch

        if current().world == 1:
            raise typer.Exit(launch(gpus, sys.argv[1:]))
    flags = {
        "training.epochs": epochs,
        "training.iterations": iterations,
        "training.time_limit": time_limit,
        "training.batch_size": batch_size,
        "training.patch_size": None if patch_size is None else _numbers(patch_size, "--patch-size"),
        "optimizer.lr": lr,
        "training.precision": precision,
        "training.seed": seed,
        "training.workers": workers,
        "training.cache": cache,
        "training.init": init,
        "training.freeze": freeze,
    }
    how: dict[str, Any] = {"folds": folds, "group_by": group_by, "stratify": stratify_by or stratify, "splits": splits}
    results = {}
    names = api.fold_names(**how, dataset=dataset, workspace=workspace) if fold == "all-folds" else [fold]
    for one in names:
        scores = api.train(
            configuration, one, **how, recipe=recipe, changes=_changes(flags, assignments), dataset=dataset, name=name,
            device=device, restart=restart and ("model" if len(names) > 1 else True), resume=resume, force=force,
            preview=preview, workspace=workspace,
        )  # fmt: skip
        restart = False  # the first fold has set all of them aside
        if scores is not None:
            results[one] = scores.to_json()
            if not as_json:
                print(f"fold {one}, whole images:\n{scores.table()}")
    if as_json and not log.is_quiet():
        print(json.dumps(results, indent=1))


@app.command()
def predict(
    source: Annotated[
        list[Path], typer.Option("-i", "--input", help="Image, DICOM series, or folder of them; may be repeated.")
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder for the label maps.")],
    model: Annotated[
        list[Path] | None,
        typer.Option("-m", "--model", help="Model folder [the trained one]; several vote together."),
    ] = None,
    configuration: Annotated[
        list[str] | None, typer.Option("-c", "--configuration", help="2d, 3d_fullres, ...; several vote together.")
    ] = None,
    folds: Annotated[list[str] | None, typer.Option("-f", "--fold", help="Networks to average [all trained].")] = None,
    speed: Annotated[
        Speed | None, typer.Option(help="balanced: no mirrored copies; fast: one fold, fewer windows, too [best].")
    ] = None,
    mirroring: Annotated[bool | None, typer.Option(help="Average over mirrored copies: 4 to 8 times slower.")] = None,
    step_size: Annotated[float | None, typer.Option(help="Distance of windows as a share of the patch.")] = None,
    precision: Precision = None,
    max_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Beside the image; of the GPU's as well [80 % of what is free].")
    ] = None,
    save_probabilities: Annotated[
        str | None,
        typer.Option(_PROBABILITIES, metavar="[LABELS]", help="Maps of them too: all, or names with commas [all]."),
    ] = None,
    save_uncertainty: Annotated[
        bool, typer.Option("--save-uncertainty", help="Maps of entropy and of the folds' disagreement too.")
    ] = False,
    dicom_seg: Annotated[bool, typer.Option("--dicom-seg", help="Write DICOM segmentations of DICOM series.")] = False,
    device: Device = None,
    skip_existing: Annotated[bool, typer.Option("--continue", help="Keep label maps that are there.")] = False,
    assignments: SetOptions = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Segment images with a trained model."""
    from nnunet_lite.data.problems import plural

    flags = {
        "inference.mirroring": mirroring,
        "inference.step_size": step_size,
        "inference.precision": precision,
        "inference.max_memory": max_memory,
    }
    done = api.predict(
        source, out, model=model or None, configuration=configuration or None, folds=folds or None,
        speed=None if speed is None else speed.value, save_probabilities=save_probabilities,
        save_uncertainty=save_uncertainty, dicom_seg=dicom_seg, dataset=dataset, device=device,
        changes=_changes(flags, assignments), skip_existing=skip_existing, workspace=workspace,
    )  # fmt: skip
    models = [str(folder) for folder in done.models]
    result = {"files": [str(path) for path in done.files], "failed": done.failed, "models": models}
    _show(result, f"{plural(len(done.files), 'label map')} in {out}", as_json)
    for case, why in done.failed.items():
        log.info(f"failed: {case}: {why}")
    raise typer.Exit(1 if done.failed else 0)


@app.command()
def evaluate(
    prediction: Annotated[Path, typer.Argument(help="Label map, or folder of label maps.")],
    reference: Annotated[Path, typer.Argument(help="Its reference, or their folder.")],
    tolerance: Annotated[float, typer.Option(help="Of the surface Dice, in mm.")] = 1.0,
    surface: Annotated[bool, typer.Option(help="Surface distances too.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON (.json) or one row per case and label (.csv).")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Score label maps against references: Dice, surface distances, volumes, lesions."""
    from nnunet_lite.workspace import write_json, write_text

    scores = api.evaluate(prediction, reference, tolerance_mm=tolerance, surface=surface, workers=workers)
    if output is not None and output.suffix == ".csv":
        write_text(output, scores.to_csv())
    elif output is not None:
        write_json(output, scores.to_json())
    _show(scores.to_json(), scores.table(), as_json)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Zip of `nnlite export`, or model folder of nnU-Net v2.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="New folder [in the workspace].")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Set a model of that name aside.")] = False,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Make a model folder of a zip or of a model that nnU-Net wrote; nothing that they may carry is run."""
    made = api.import_model(source, output, replace=replace, workspace=workspace)
    _show({"model": str(made)}, f"{made}: predict with `nnlite predict -m {made}`", as_json)


@app.command()
def export(
    file: Annotated[Path | None, typer.Argument(help="Zip to write, such as model.zip.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write: nnunet, onnx.")] = None,
    model: Annotated[Path | None, typer.Option("-m", "--model", help="Model folder [the trained one].")] = None,
    configuration: Annotated[str | None, typer.Option("-c", "--configuration", help="2d, 3d_fullres, ...")] = None,
    format: Annotated[ModelFormat, typer.Option(help="What to make.")] = ModelFormat.zip,
    licence: Annotated[str | None, typer.Option(help="SPDX identifier, text or file; for zip.")] = None,
    note: Annotated[str | None, typer.Option(help="On the training data; for zip.")] = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Pack a model into one file, or write it as a folder for nnU-Net v2 or for onnxruntime."""
    target = file or output
    if target is None or (file is not None and output is not None):
        raise UserError("say where to: `nnlite export MODEL.zip`, or `--format nnunet -o FOLDER`")
    if (format is ModelFormat.zip) != (target.suffix == ".zip"):
        raise UserError(f"{target}: a zip ends in .zip, and a folder needs --format nnunet or onnx")
    folder = api.export_model(
        target, model, format=format.value, licence=licence, note=note, configuration=configuration, dataset=dataset,
        workspace=workspace,
    )  # fmt: skip
    result = {"model": str(folder), "output": str(target), "format": format.value}
    use = {"zip": "nnlite import", "nnunet": "nnUNetv2_predict_from_modelfolder -m", "onnx": "see docs/models.md:"}
    _show(result, f"{target}: {use[format.value]} {target}", as_json)


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="Model folder [all models of the current data set].")] = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """What a model is, how it was made and how well it scores; or what the current data set has."""
    from nnunet_lite.describe import describe_dataset, describe_model

    about = describe_model(model) if model else describe_dataset(api.current_paths(workspace, dataset))
    _show(about.values, about.text, as_json)


@app.command()
def doctor(as_json: AsJson = False, workspace: Workspace = None) -> None:
    """What this machine has: versions, CPUs, memory, GPUs, disk; and what is wrong with it."""
    from nnunet_lite.describe import describe_machine
    from nnunet_lite.workspace import workspace_folder

    about = describe_machine(workspace_folder(workspace))
    _show(about.values, about.text, as_json)
    raise typer.Exit(1 if about.values["problems"] else 0)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Self-configuring medical image segmentation: plan, train, predict."""
