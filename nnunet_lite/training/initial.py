"""Fine-tuning: a network that starts from the weights of a trained model, and weights that stay as they are.

The learning rate stays the recipe's. A tenth of the default one is what fine-tuning usually wants: `--lr 0.001`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nnunet_lite import log
from nnunet_lite.data.geometry import turn_between
from nnunet_lite.data.labels import BACKGROUND, Labels
from nnunet_lite.errors import UserError
from nnunet_lite.models.checkpoint import read_state
from nnunet_lite.models.folder import MODEL, read_run
from nnunet_lite.models.lookup import is_nnunet, nnunet_folds
from nnunet_lite.models.nnunet import read_nnunet_fold
from nnunet_lite.planning.memory import with_memory
from nnunet_lite.planning.schema import Channel, Plan, exact_storage
from nnunet_lite.settings import Settings
from nnunet_lite.training.job import Job

Part = Literal["encoder", "all-but-head"]
_FROZEN: dict[str, tuple[str, ...]] = {"encoder": ("stem.", "encoder."), "all-but-head": ("",)}
_HEADS = "heads."
_FIRST = ("stem.0.weight", "encoder.0.0.0.weight")  # with a residual encoder, with a plain one
_STAGE = "previous stage: "  # opens the names of a cascade's one-hot inputs
_SHOWN = 4  # names in a line of a table


@dataclass(frozen=True)
class Source:
    """A trained fold to start from, and the plan that it was trained with.

    Parameters
    ----------
    file : model.safetensors, or a checkpoint of nnU-Net.
    fold : such as "0"; "all" where the weights have seen all cases, or may have.
    """

    file: Path
    plan: Plan
    configuration: str
    fold: str = "all"


def find_source(model: Path, dataset: str, fold: str) -> Source:
    """The fold to start from.

    Parameters
    ----------
    model : a model folder, ours or nnU-Net's, or the file of one of its folds: model.safetensors, or a checkpoint of
        nnU-Net, which is read without running anything in it.
    dataset, fold : what is to be trained. A model of the same data set gives the same fold, which has not seen the
        held-out cases; one of another gives the fold that was trained on all cases, else the same, else its first.

    Raises
    ------
    UserError : no model folder, or none of its folds is trained.
    """
    model = model.expanduser()
    folder = model.absolute().parents[1] if model.is_file() else model
    theirs = is_nnunet(folder) or (model.is_file() and model.suffix == ".pth")
    if not theirs and not (folder / "run.json").is_file():
        what = "is no model folder, nor the file of a fold in one (model.safetensors, or a .pth of nnU-Net)"
        raise UserError(what, model, "Make a model folder of a zip with `nnlite import`.")
    if model.is_file():
        return _source(model)
    files = list(nnunet_folds(folder).values()) if theirs else sorted(folder.glob(f"fold_*/{MODEL}"))
    if not files:
        fix = "Give the file of another checkpoint." if theirs else "Train one with `nnlite train`."
        raise UserError("has no trained fold to start from", folder, fix)
    trained = {file.parent.name.removeprefix("fold_"): file for file in files}
    first = _source(files[0])
    wanted = (fold, "all") if first.plan.dataset == dataset else ("all", fold)
    chosen = next(name for name in (*wanted, *trained) if name in trained)
    return replace(first, file=trained[chosen], fold=chosen)


def _source(file: Path) -> Source:
    """A fold to start from, of the file that holds its weights."""
    if file.suffix == ".pth":
        read = read_nnunet_fold(file)
        return Source(file, read.plan, read.run["configuration"], read.name)
    folder = file.absolute().parents[1]
    fold = file.parent.name.removeprefix("fold_")
    return Source(file, Plan.read(folder / "plans.json"), read_run(folder)["configuration"], fold)


def adopted_plan(own: Plan, configuration: str, source: Source, settings: Settings) -> Plan:
    """The plan to fine-tune with: the data set's own, with what the weights depend on from the model.

    From the model come orientation, axis order, spacing, patch, batch, network and resampling, and, for channels of
    equal name, the normalisation with its statistics: a filter learnt on CT expects the same value for the same
    Hounsfield unit. Labels, batch Dice and cascade stay the dataset's. Settings of patch and network are applied
    afterwards.

    Raises
    ------
    UserError : the model is of another dimension, kind or normalisation layer than planned or set.
    """
    planned, theirs = own.configuration(configuration), source.plan.configuration(source.configuration)
    norm, kind = theirs.network.norm, theirs.network.kind
    asked = kind if settings.plan.preset is None else planned.network.kind
    for what, here, there, fix in (
        ("dimensions", planned.dimensions, theirs.dimensions, "Train a configuration of as many."),
        ("kind of U-Net", asked, kind, "Take a recipe without a preset."),
        ("normalisation", settings.network.norm or norm, norm, "Leave network.norm out of the settings."),
    ):
        if here != there:
            raise UserError(f"does not fit {configuration}: {what} {there}, here {here}", source.file, fix)
    order = source.plan.axis_order
    orientation = source.plan.orientation or own.orientation
    turn = turn_between(own.orientation, orientation).then(order)
    moved = [own.axis_order.index(axis) for axis in turn.order]
    spacing, shape = (tuple(values[i] for i in moved) for values in (own.median_spacing, own.median_shape))
    axes = zip(shape, spacing, (spacing[0], *theirs.spacing)[-3:], strict=True)  # 2D: slices stay as they are
    resampled = tuple(float(max(1, round(n * old / new))) for n, old, new in axes)
    known = {channel.name.casefold(): channel for channel in source.plan.channels}
    adopted = planned.model_copy(
        update={
            "spacing": theirs.spacing,
            "median_shape": resampled[-theirs.dimensions :],
            "patch_size": theirs.patch_size,
            "batch_size": theirs.batch_size,
            "network": theirs.network,
            "resampling": theirs.resampling,
            "reasons": (f"taken over from {source.configuration} of {source.plan.dataset}, to start from its weights",),
        }
    )
    adopted = with_memory(adopted, len(own.channels), own.labels)
    channels = tuple(_normalised_as(channel, known) for channel in own.channels)
    return own.model_copy(
        update={
            "orientation": orientation,
            "axis_order": order,
            "median_spacing": spacing,
            "median_shape": shape,
            "channels": channels,
            "stored_as": exact_storage(channels) if own.stored_as == exact_storage(own.channels) else own.stored_as,
            "configurations": {**own.configurations, configuration: adopted},
        }
    )


def _normalised_as(channel: Channel, known: Mapping[str, Channel]) -> Channel:
    """A channel with the normalisation of the model's channel of that name, if it has one."""
    return known.get(channel.name.casefold(), channel).model_copy(update={"name": channel.name})


def start_from(network: nn.Module, job: Job) -> None:
    """Give a network the weights of `training.init`, if that is set, and log what became of them.

    Raises
    ------
    UserError : not a single tensor fits, or weights are to be frozen that nobody has trained.
    """
    training = job.settings.training
    if training.init is None:
        if training.freeze is not None:
            raise UserError(f"--freeze {training.freeze} would keep random weights", fix="Give a model with --init.")
        return
    fold = job.folder.name.removeprefix("fold_")
    source = find_source(Path(training.init), job.plan.dataset, fold)
    if source.plan.dataset == job.plan.dataset and source.fold != fold != "all":
        log.warn(f"{source.file} is of fold {source.fold}, which was trained on cases that fold {fold} holds out")
    loaded = adopt(
        network,
        _weights(source.file),
        source.plan.labels,
        job.plan.labels,
        input_names(source.plan, source.configuration),
        input_names(job.plan, job.configuration),
    )
    if not loaded.taken:
        raise UserError(f"nothing in it fits the network of {job.configuration}", source.file,
                        "Leave the settings of the network as they were when it was trained.")  # fmt: skip
    log.info(f"starting from {source.file}\n{loaded.to_text()}")


def _weights(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if file.suffix == ".pth":
        return read_nnunet_fold(file).network.state_dict()
    read_state(file)  # refuses what is no safetensors file
    return load_file(file)


@dataclass(frozen=True)
class Loaded:
    """What became of each tensor of a network that starts from a trained one.

    Parameters
    ----------
    taken, adapted, random : names of tensors that are the model's, were made from the model's, or stay at random.
    unused : names of the model's tensors that the network has no place for.
    share : of the network's weights that come from the model, 0 to 1.
    inputs, outputs : for each channel of the network, what of the model it was made from.
    """

    taken: tuple[str, ...]
    adapted: tuple[str, ...]
    random: tuple[str, ...]
    unused: tuple[str, ...]
    share: float
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]

    def to_text(self) -> str:
        """A short table."""
        rows = [("taken over", f"{len(self.taken)} tensors; {100 * self.share:.1f} % of the weights are the model's")]
        rows += [(f"adapted, {what}", "; ".join(f"{name}: {origin}" for name, origin in made))
                 for what, made in (("inputs", self.inputs), ("outputs", self.outputs))
                 if any(name.casefold() != origin.casefold() for name, origin in made)]  # fmt: skip
        rows += [(what, f"{len(names)} tensors: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}")
                 for what, names in (("at random", self.random), ("not used", self.unused)) if names]  # fmt: skip
        width = max(len(what) for what, _ in rows)
        return "\n".join(f"  {what:<{width}}  {text}" for what, text in rows)


def adopt(
    network: nn.Module,
    source_state: Mapping[str, Tensor],
    source_labels: Labels,
    target_labels: Labels,
    source_channels: Sequence[str],
    target_channels: Sequence[str],
) -> Loaded:
    """Copy into a network every tensor of a trained one that fits by name and shape; the rest stays at random.

    Rows of the heads go by the names of labels or regions. The first layer is adapted to other channels: those of
    equal name are copied, others get the mean of the model's, and all are scaled so that inputs of unit variance have
    a response of the same size. Channels that have no name in common but the same number are taken in their order. A
    cascade's one-hot inputs that the model did not have start at zero: the network starts as it was without them.

    Parameters
    ----------
    source_channels, target_channels : names of the inputs of the trained network and of this one, see `input_names`.
    """
    own = network.state_dict()
    given = {name: value.to(own[name]) for name, value in source_state.items() if name in own}
    first = next((name for name in _FIRST if name in own), None)
    rows = _matches(output_names(source_labels), output_names(target_labels))
    columns = _matches(source_channels, target_channels)
    if len(source_channels) == len(target_channels) and not any(column is not None for column in columns):
        columns = list(range(len(source_channels)))
    fitted = dict(given)
    for name, value in given.items():
        if name == first:
            fitted[name] = _with_columns(value, columns, source_channels, target_channels)
        elif name.startswith(_HEADS):
            fitted[name] = _with_rows(own[name], value, rows)
    new = {name: value for name, value in fitted.items() if value.shape == own[name].shape}
    network.load_state_dict({**own, **new})
    names = zip(target_channels, columns, strict=True)
    classes = zip(output_names(target_labels), rows, strict=True)
    return Loaded(
        taken=tuple(name for name, value in new.items() if value is given[name]),
        adapted=tuple(name for name, value in new.items() if value is not given[name]),
        random=tuple(name for name in own if name not in new),
        unused=tuple(name for name in source_state if name not in new),
        share=sum(value.numel() for value in new.values()) / sum(value.numel() for value in own.values()),
        inputs=tuple((name, _origin(name, column, source_channels)) for name, column in names),
        outputs=tuple((name, "at random" if i is None else output_names(source_labels)[i]) for name, i in classes),
    )


def _matches(source: Sequence[str], target: Sequence[str]) -> list[int | None]:
    """For each target name the index of the equal source name, whatever its case, or None."""
    index = {name.casefold(): i for i, name in reversed(list(enumerate(source)))}
    return [index.get(name.casefold()) for name in target]


def _with_rows(own: Tensor, given: Tensor, rows: Sequence[int | None]) -> Tensor:
    """A head's tensor (outputs, ...) with the model's rows where it has them, the network's own elsewhere."""
    if given.shape[1:] != own.shape[1:] or rows == list(range(len(given))):
        return given
    return torch.stack([own[row] if i is None else given[i] for row, i in enumerate(rows)])


def _with_columns(given: Tensor, columns: Sequence[int | None], source: Sequence[str], target: Sequence[str]) -> Tensor:
    """The first layer's kernel (outputs, inputs, ...) for other inputs."""
    if columns == list(range(given.shape[1])):
        return given
    mean = given[:, [not name.startswith(_STAGE) for name in source]].mean(1)
    without = {True: torch.zeros_like(mean), False: mean}
    new = torch.stack(
        [
            without[name.startswith(_STAGE)] if i is None else given[:, i]
            for name, i in zip(target, columns, strict=True)
        ],
        1,
    )
    scale = given.norm() / new.norm()
    return new if torch.isclose(scale, torch.ones_like(scale)) else new * scale  # 1: the same channels in another order


def _origin(name: str, column: int | None, source: Sequence[str]) -> str:
    """What an input's column of the first layer was made from."""
    if column is not None:
        return source[column]
    return "zero" if name.startswith(_STAGE) else f"mean of {', '.join(s for s in source if not s.startswith(_STAGE))}"


def input_names(plan: Plan, configuration: str) -> tuple[str, ...]:
    """Names of a network's inputs: the image's channels, then the foreground classes of a cascade's previous stage."""
    images = tuple(channel.name for channel in plan.channels)
    if plan.configuration(configuration).previous_stage is None:
        return images
    labels = plan.labels
    classes = map(str, labels.values[1:]) if labels.has_regions else labels.region_names
    return (*images, *(f"{_STAGE}{name}" for name in classes))


def output_names(labels: Labels) -> tuple[str, ...]:
    """Names of a network's output channels: the regions, or the background and the labels."""
    return labels.region_names if labels.has_regions else (BACKGROUND, *labels.region_names)


def freeze(network: nn.Module, part: Part | None) -> None:
    """Keep the weights of a part as they are: no gradients, and batch norm with the statistics that it has.

    Raises
    ------
    UserError : the network, which a factory made, has no such part.
    """
    if part is None:
        return
    parameters = dict(network.named_parameters())
    frozen = {name for name in parameters if name.startswith(_FROZEN[part])}
    frozen -= {name for name in frozen if name.startswith(_HEADS)}
    if not frozen or len(frozen) == len(parameters):
        raise UserError(f"--freeze {part}: the network has no tensors called encoder.* and heads.*")
    for name in frozen:
        parameters[name].requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in frozen:
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc] # stays so
