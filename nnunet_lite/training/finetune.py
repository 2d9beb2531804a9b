"""Fine-tuning: a network that starts from the weights of a trained model, and weights that stay as they are.

`open_source` (which fold) -> `adopt_plan` (what the weights depend on) -> `start_from` (copy what fits) -> `freeze`.
The learning rate stays the recipe's; the recipe `finetune` has a tenth of the default one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_lite import log
from nnunet_lite.data.geometry import turn_between
from nnunet_lite.data.labels import BACKGROUND, Labels
from nnunet_lite.data.problems import few
from nnunet_lite.errors import UserError
from nnunet_lite.models.argument import find_model, unpacked
from nnunet_lite.models.bundle import find_licence
from nnunet_lite.models.checkpoint import read_weights
from nnunet_lite.models.folder import CHECKPOINT, EXPECTED, MODEL, is_model, is_nnunet, weight_files
from nnunet_lite.models.lookup import read_model
from nnunet_lite.models.nnssl import ADAPTATION, read_nnssl
from nnunet_lite.models.nnunet import read_checkpoint, read_nnunet_fold
from nnunet_lite.planning.memory import with_memory
from nnunet_lite.planning.schema import Plan, exact_storage
from nnunet_lite.planning.swaps import warn_of_lost_swaps
from nnunet_lite.planning.topology import join_by_x
from nnunet_lite.settings import AugmentationSettings, Part, Settings
from nnunet_lite.system import expand_home
from nnunet_lite.training.job import Job
from nnunet_lite.training.splits import are_other_cases, record_seen

Names = tuple[Sequence[str], Sequence[str]]  # of the trained network, and of this one
_FROZEN: dict[str, tuple[str, ...]] = {"encoder": ("stem.", "encoder."), "all-but-head": ("",)}
_HEADS = "heads."
_FIRST = ("stem.0.weight", "stem.weight", "encoder.0.0.0.weight")  # first layer of a residual encoder, MedNeXt, plain
_DEPTHWISE = ".depthwise.weight"
_STAGE = "previous stage: "  # starts the names of a cascade's one-hot inputs
_ADOPTED = ("spacing", "patch_size", "batch_size", "network", "resampling")  # of the model's configuration
_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".model")  # files, not folders or names
_SHOWN = 4  # names in a line of the report


# ------------------------------------------------------------------------------------------------ which model and plan


@dataclass(frozen=True)
class Source:
    """A trained fold to start from.

    Parameters
    ----------
    file : Path
        model.safetensors, or a checkpoint of nnU-Net or nnssl.
    plan : Plan
        That it was trained with.
    configuration : str
        Of that plan.
    state : dict of str to Tensor
        Its weights.
    fold : str
        Such as "0"; "all" if the weights have seen all cases, or may have; empty if they have seen no labels.
    augmentation : AugmentationSettings
        Of its training.
    licence : str, optional
        Its first words, if one is given.
    """

    file: Path
    plan: Plan
    configuration: str
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    fold: str = "all"
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    licence: str | None = None


@contextmanager
def open_source(model: str, workspace: Path, plan: Plan, fold: str, configuration: str) -> Iterator[Source]:
    """Yield the fold to start from, whose file exists while the block runs: a zip is unpacked.

    A model of the same dataset gives the same fold, which was not trained on the held-out cases. A model of another
    dataset gives the fold that was trained on all cases, otherwise the same fold, otherwise its first one. nnU-Net's
    best checkpoints are taken if there is no final one.

    Parameters
    ----------
    model : str
        A model, as for `find_model`, or the file of one of its folds: model.safetensors, or a checkpoint of nnU-Net or
        nnssl, which is read without running anything in it.
    workspace : Path
        Where a model is looked up by name.
    plan, fold, configuration : Plan, str, str
        What is trained now.

    Raises
    ------
    UserError
        There is no model, or none of its folds is trained.
    """
    file = expand_home(model)
    if file.is_file() and file.suffix in _CHECKPOINTS:
        yield _read_source(file, plan, configuration)
        return
    with unpacked(find_model(model, workspace, configuration=configuration, required=False)) as folder:
        trained = weight_files(folder) or weight_files(folder, "best")
        if not trained:
            fix = "Give the file of another checkpoint." if is_nnunet(folder) else "Train one with `nnlite train`."
            raise UserError("has no trained fold to start from", folder, fix)
        source = _read_source(next(iter(trained.values())), plan, configuration)
        preferred = (fold, "all") if source.plan.dataset == plan.dataset else ("all", fold)
        chosen = next(name for name in (*preferred, *trained) if name in trained)
        if trained[chosen] != source.file:
            source = _read_source(trained[chosen], plan, configuration)
        yield replace(source, fold=chosen)


def _read_source(file: Path, plan: Plan, configuration: str) -> Source:
    folder, checkpoint = file.absolute().parents[1], {}
    state: Mapping[str, Tensor]
    if file.suffix == ".safetensors":
        if file.name == CHECKPOINT:
            raise UserError("is a run that only its own command resumes", file, f"Give the {MODEL} that it ends with.")
        state, fold = read_weights(file)[0], file.parent.name.removeprefix("fold_")
        if not is_model(folder):
            raise UserError(f"is in no model folder of nnlite; it contains {few(list(state))}", file, EXPECTED)
        theirs, run = read_model(folder)
    elif ADAPTATION in (checkpoint := read_checkpoint(file)):
        (theirs, state), fold = read_nnssl(checkpoint, plan, configuration, file), ""
        run = {"configuration": configuration, "settings": {}}  # any axis may be mirrored
    else:
        read = read_nnunet_fold(file, checkpoint)
        theirs, run, state, fold = read.plan, read.run, read.network.state_dict(), read.name
    augmentation = Settings.model_validate(run["settings"]).augmentation
    licence = find_licence(folder if is_model(folder) else file.parent, checkpoint)
    return Source(file, theirs, run["configuration"], state, fold, augmentation, licence)


def adopt_plan(plan: Plan, configuration: str, source: Source, settings: Settings) -> Plan:
    """Return the plan to fine-tune with: the dataset's, with what the weights depend on taken from the model.

    The model gives orientation, axis order, spacing, patch, batch, network and resampling, and, for channels of equal
    name, the normalization with its statistics: a filter learnt on CT expects the same value for the same Hounsfield
    unit. Labels, batch Dice and cascade stay the dataset's. Settings of patch and network are applied afterwards.

    Raises
    ------
    UserError
        The model has another number of dimensions than planned, or network, normalization layer or spacing than set.
    """
    planned, model = plan.configuration(configuration), source.plan.configuration(source.configuration)
    norm, kind, lengths = model.network.norm, model.network.kind, sorted(model.spacing)  # axes may have another order
    given = lengths if settings.plan.spacing is None else sorted(planned.spacing)
    for what, own, theirs, fix in (
        ("dimensions", planned.dimensions, model.dimensions, "Train a configuration of as many."),
        ("network", kind if settings.plan.preset is None else planned.network.kind, kind,
         "Take a recipe without plan.preset: the network is that of the model."),
        ("spacing", given, lengths, "Leave out plan.spacing, or --set plan.adopt=false."),
        ("normalisation", settings.network.norm or norm, norm, "Leave network.norm out of the settings."),
    ):  # fmt: skip
        if own != theirs:
            raise UserError(f"does not fit {configuration}: {what} {theirs}, here {own}", source.file, fix)
    order = source.plan.axis_order
    orientation = source.plan.orientation or plan.orientation
    turn = turn_between(plan.orientation, orientation).then(order)
    axes = [plan.axis_order.index(axis) for axis in turn.order]
    spacing, shape = (tuple(values[i] for i in axes) for values in (plan.median_spacing, plan.median_shape))
    target = (spacing[0], *model.spacing)[-3:]  # in 2D slices keep their distance
    resampled = tuple(max(1.0, n * old / new) for n, old, new in zip(shape, spacing, target, strict=True))
    reason = f"taken over from {source.configuration} of {source.plan.dataset}, to start from its weights"
    changes = {name: getattr(model, name) for name in _ADOPTED}
    changes |= {"median_shape": resampled[-model.dimensions :], "reasons": (reason,)}
    adopted = with_memory(planned.model_copy(update=changes), len(plan.channels), plan.labels)
    known = {channel.name.casefold(): channel for channel in source.plan.channels}
    channels = tuple(known.get(c.name.casefold(), c).model_copy(update={"name": c.name}) for c in plan.channels)
    exact = plan.stored_as == exact_storage(plan.channels)
    return plan.model_copy(
        update={
            "orientation": orientation,
            "axis_order": order,
            "median_spacing": spacing,
            "median_shape": shape,
            "channels": channels,
            "stored_as": exact_storage(channels) if exact else plan.stored_as,
            "configurations": {**plan.configurations, configuration: adopted},
        }
    )


# ------------------------------------------------------------------------------------------------------------ weights


def start_from(network: nn.Module, job: Job) -> None:
    """Give a network the weights of `training.init`, if that is set, and log what became of them.

    Raises
    ------
    UserError
        No layer but the heads fits, or layers that the model lacks are to be frozen.
    """
    training = job.settings.training
    if training.init is None:
        return
    fold = job.folder.name.removeprefix("fold_")
    workspace = job.folder.absolute().parents[3]  # WORKSPACE/DATASET/models/MODEL/fold_0
    with open_source(training.init, workspace, job.plan, fold, job.configuration) as source:
        place, same = source.file.parent, source.plan.dataset == job.plan.dataset and source.fold != ""
        if job.ranks.rank == 0:
            other = source.fold != fold or are_other_cases(place, job.folder)
            record_seen(job.folder, training.init, [place], maybe_all=same and other)
        own, earlier = job.settings.augmentation, source.augmentation.mirrored_axes(job.dimensions)
        if new := ", ".join(str(axis) for axis in own.mirrored_axes(job.dimensions) if axis not in earlier):
            log.warn(
                f"{training.init} was trained without mirrored copies along axis {new}, and this run mirrors, also to "
                f"predict; --set augmentation.mirror_axes={[*earlier]} keeps the axes of the model"
            )
        warn_of_lost_swaps(training.init, source.augmentation, own, job.plan, job.dimensions)
    inputs = input_names(source.plan, source.configuration), input_names(job.plan, job.configuration)
    outputs = _output_names(source.plan.labels), _output_names(job.plan.labels)
    before = {name: value.clone() for name, value in network.state_dict().items() if _is_frozen(name, training.freeze)}
    report = adopt_weights(network, source.state, inputs, outputs)
    if not report:
        planned = source.plan.configuration(source.configuration), job.planned
        words = [f"{one.dimensions}D, network {one.network.kind}" for one in planned]
        if words[0] != words[1]:
            fix = "Leave out --set plan.adopt=false, and train a configuration of as many dimensions."
            raise UserError(f"does not fit {job.configuration}: {words[0]}, here {words[1]}", source.file, fix)
        sizes = job.settings.network.model_dump(include={"features_base", "features_max", "kernel"}, exclude_none=True)
        unset = f" Unset those of the recipe: {' '.join(f'--set network.{key}=none' for key in sizes)}" if sizes else ""
        raise UserError(f"no layer of it fits the network of {job.configuration}", source.file,
                        f"Leave the settings of the network as they were when it was trained.{unset}")  # fmt: skip
    now = network.state_dict()
    if random := [name for name, value in before.items() if value.ndim > 1 and torch.equal(value, now[name])]:
        what = f"--freeze {training.freeze} would keep random weights, which the model lacks: {few(random)}"
        raise UserError(what, source.file, "Freeze less, or nothing.")
    report = report if source.licence is None else {"licence": source.licence, **report}
    part = f"fold {source.fold}" if source.fold else "the encoder"
    lines = (f"  {what:<16}  {text}" for what, text in report.items())
    log.info("\n".join([f"starting from {part} of {training.init}", *lines]))


def adopt_weights(network: nn.Module, state: Mapping[str, Tensor], inputs: Names, outputs: Names) -> dict[str, str]:
    """Copy into a network every tensor of a trained one that fits by name and shape; the rest stays random.

    Rows of the heads are matched by the names of labels or regions. The first layer is adapted to other channels:
    channels of equal name are copied, others get the mean of the model's, and all are scaled so that inputs of unit
    variance have a response of the same size. Channels that have no name in common but the same number are matched in
    their order. A cascade's one-hot inputs that the model did not have start at zero: the network starts as it was
    without them.

    Parameters
    ----------
    network : Module
        Changed in place.
    state : mapping of str to Tensor
        Weights of the trained network.
    inputs, outputs : tuple of two sequences of str
        Names in the trained network and in this one, see `input_names`.

    Returns
    -------
    dict of str to str
        The lines of a report on what was taken over, adapted, left at random and not used; empty if no layer but the
        heads fits.
    """
    own = network.state_dict()
    first = next((name for name in _FIRST if name in own), None)
    columns, rows = _match_names(*inputs), _match_names(*outputs)
    if len(inputs[0]) == len(inputs[1]) and not any(column is not None for column in columns):
        columns = list(range(len(columns)))
    new, n_equal = {}, 0
    for name in [name for name in state if name in own]:
        value = adapted = state[name].to(own[name])
        if name == first:
            adapted = _select_inputs(value, columns, *inputs)
        elif name.startswith(_HEADS):
            if all(row is None for row in rows):
                continue  # nothing of it would be the model's
            adapted = _select_outputs(own[name], value, rows)
        if (fitted := fit_tensor(name, adapted, own[name])) is not None:
            new[name] = fitted
            # a kernel: the counters of batch norm fit any network
            n_equal += fitted is value and value.ndim > 1 and not name.startswith(_HEADS)
    network.load_state_dict({**own, **new})
    if not n_equal:
        return {}
    if first is not None and first not in new:
        log.warn(f"the first layer ({first}) does not fit and stays random; those after it learnt on another one")
    share = sum(value.numel() for value in new.values()) / sum(value.numel() for value in own.values())
    report = {"taken over": f"{len(new)} tensors; {100 * share:.1f} % of the weights are the model's"}
    images = [name for name in inputs[0] if not name.startswith(_STAGE)]
    for what, (theirs, names), indices, missing, averaged in (
        ("inputs", inputs, columns, f"mean of {', '.join(images)}", images),
        ("outputs", outputs, rows, "at random", []),
    ):
        origins = [
            theirs[i] if i is not None else "zero" if name.startswith(_STAGE) else missing
            for name, i in zip(names, indices, strict=True)
        ]
        if [name.casefold() for name in names] != [origin.casefold() for origin in origins]:
            report[f"adapted, {what}"] = "; ".join(f"{n}: {origin}" for n, origin in zip(names, origins, strict=True))
        used = {i for i, name in enumerate(theirs) if i in indices or (missing in origins and name in averaged)}
        if unused := [name for i, name in enumerate(theirs) if i not in used]:
            report[f"unused, {what}"] = "; ".join(unused)
    if resized := [name for name in new if name.endswith(_DEPTHWISE) and state[name].shape != own[name].shape]:
        before, after = (join_by_x(tensors[resized[-1]].shape[2:]) for tensors in (state, own))
        report["resized"] = f"{len(resized)} depthwise kernels, such as {before} to {after} (UpKern)"
    for what, tensors in (("at random", own), ("not used", state)):
        if left := [name for name in tensors if name not in new]:
            report[what] = f"{len(left)} tensors: {', '.join(left[:_SHOWN])}{', ...' * (len(left) > _SHOWN)}"
    return report


def fit_tensor(name: str, value: Tensor, own: Tensor) -> Tensor | None:
    """Return a tensor of the model in the shape of the network's own, or None if that one stays random.

    A depthwise kernel of another size is resized by linear interpolation: UpKern of Roy et al. 2023 (arXiv:2303.09975).

    Parameters
    ----------
    name : str
        Of the tensor.
    value : Tensor
        Of the model, with the inputs or outputs of this network already.
    own : Tensor
        Of the network, of any shape.
    """
    if value.shape == own.shape:
        return value
    if not (name.endswith(_DEPTHWISE) and value.shape[:2] == own.shape[:2] and value.ndim == own.ndim):
        return None
    return F.interpolate(value, size=own.shape[2:], mode="bilinear" if own.ndim == 4 else "trilinear")


def _match_names(source: Sequence[str], target: Sequence[str]) -> list[int | None]:
    """For each target name the index of the equal source name, whatever its case, or None."""
    index = {name.casefold(): i for i, name in reversed(list(enumerate(source)))}
    return [index.get(name.casefold()) for name in target]


def _select_outputs(own: Tensor, weights: Tensor, rows: Sequence[int | None]) -> Tensor:
    """A head's tensor (outputs, ...) with the model's rows where it has them, otherwise the network's own."""
    if weights.shape[1:] != own.shape[1:] or rows == list(range(len(weights))):
        return weights
    return torch.stack([own[row] if i is None else weights[i] for row, i in enumerate(rows)])


def _select_inputs(
    weights: Tensor, columns: Sequence[int | None], source: Sequence[str], target: Sequence[str]
) -> Tensor:
    """The first layer's kernel (outputs, inputs, ...) for other inputs."""
    if columns == list(range(weights.shape[1])):
        return weights
    mean = weights[:, [not name.startswith(_STAGE) for name in source]].mean(1)
    new = [
        weights[:, i] if i is not None else torch.zeros_like(mean) if name.startswith(_STAGE) else mean
        for name, i in zip(target, columns, strict=True)
    ]
    kernel = torch.stack(new, 1)
    scale = weights.norm() / kernel.norm()
    same = torch.isclose(scale, torch.ones_like(scale))  # the same channels in another order
    return kernel if same else kernel * scale


def input_names(plan: Plan, configuration: str) -> tuple[str, ...]:
    """Return the names of a network's inputs: the image's channels, then the classes of a cascade's first stage."""
    images = tuple(channel.name for channel in plan.channels)
    if plan.configuration(configuration).previous_stage is None:
        return images
    labels = plan.labels
    classes = map(str, labels.values[1:]) if labels.has_regions else labels.region_names
    return (*images, *(f"{_STAGE}{name}" for name in classes))


def _output_names(labels: Labels) -> tuple[str, ...]:
    """The regions, or the background and the labels."""
    return labels.region_names if labels.has_regions else (BACKGROUND, *labels.region_names)


def _is_frozen(name: str, part: Part | None) -> bool:
    """Whether a part contains a tensor."""
    return part is not None and name.startswith(_FROZEN[part]) and not name.startswith(_HEADS)


def freeze(network: nn.Module, part: Part | None) -> None:
    """Keep the weights of a part as they are: without gradients, and batch norm with its present statistics.

    Raises
    ------
    UserError
        The network, which a factory made, has no such part.
    """
    if part is None:
        return
    parameters = dict(network.named_parameters())
    frozen = {name for name in parameters if _is_frozen(name, part)}
    if not frozen or len(frozen) == len(parameters):
        raise UserError(f"--freeze {part}: the network has no tensors called encoder.* and heads.*")
    for name in frozen:
        parameters[name].requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in frozen:
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc] # stays so
