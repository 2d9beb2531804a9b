"""Everything a run can vary: a recipe (TOML), then options and `--set` -> one frozen, validated object.

A key is `section.name`, as in the recipe. Unknown keys are refused with the nearest one. The resolved settings are
stored with the run (run.json), so that a resumed or finished run says how it was made. `scripts/write_reference.py`
writes docs/reference/settings.md.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from nnunet_lite.errors import UserError, suggest
from nnunet_lite.files import must_be, read_text
from nnunet_lite.system import expand_home

_Key = TypeVar("_Key")

# ------------------------------------------------------------------------------------------------ types of values


_MINUTES = {"h": 60.0, "m": 1.0, "s": 1 / 60}


def _to_minutes(value: Any) -> Any:
    """Return "8h", "90m", "300s" or a number in minutes."""
    number, unit = (value[:-1], value[-1:]) if isinstance(value, str) else (value, "")
    try:
        return float(number) * _MINUTES[unit] if unit in _MINUTES else float(value)
    except (TypeError, ValueError):
        raise ValueError("must be minutes, or a text such as 90s, 3m or 8h") from None


def time_text(minutes: float) -> str:
    """Return minutes as a user types them, in the largest unit that makes them a whole number: 8h, 90m, 300s, 1.8s."""
    texts = f"{minutes / 60:.0f}h", f"{minutes:.0f}m", f"{60 * minutes:g}s"
    return next((text for text in texts if _to_minutes(text) == minutes), str(minutes))


def _to_absolute(factory: str) -> str:
    """Return a factory with the absolute path of its file, so that the model can be read from any folder."""
    where, _, name = factory.rpartition(":")
    return f"{expand_home(where).absolute()}:{name}" if where.endswith(".py") else factory


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]
Factors = Annotated[Range, must_be("[low, high] with 0 < low <= high", lambda r: 0 < r[0] <= r[1])]
Deviations = Annotated[Range, must_be("[low, high] with 0 <= low <= high", lambda r: 0 <= r[0] <= r[1])]
Shares = Annotated[Range, must_be("[low, high] with 0 < low <= high <= 1", lambda r: 0 < r[0] <= r[1] <= 1)]
Axes = Annotated[
    tuple[int, ...],
    must_be("different axes, each 0, 1 or 2", lambda axes: len(set(axes)) == len(axes) and set(axes) <= {0, 1, 2}),
]
Weights = Annotated[
    tuple[float, ...],
    must_be("numbers of at least 0, not all of them 0", lambda weights: sum(weights) > 0 <= min(weights)),
]
Minutes = Annotated[float, BeforeValidator(_to_minutes)]
Millimetres = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, int | float) else value),
    must_be("one length in mm, or one for each axis", lambda lengths: 1 <= len(lengths) <= 3),
]
Preset = Literal["default", "resenc_m", "resenc_l", "resenc_xl", "mednext_s", "mednext_b", "mednext_m", "mednext_l"]
NumberFormat = Literal["auto", "fp32", "bf16", "fp16"]
Auto = Literal["auto"] | bool
Logger = Literal["none", "tensorboard", "wandb", "mlflow"]
Cache = Literal["auto", "device", "ram", "disk"]
Part = Literal["encoder", "all-but-head"]  # of a network
Factory = Annotated[str, AfterValidator(_to_absolute)]


# ---------------------------------------------------------------------------------------------------- the settings


class Strict(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What every part of the settings, and of a plan, refuses: unknown keys and infinite numbers."""


class PlanSettings(Strict):
    """If a recipe sets another U-Net or spacing than the plan has, the plan is made again from the fingerprint."""

    preset: Preset | None = Field(
        None,
        description="U-Net of the plan: nnU-Net's own, a residual encoder or a MedNeXt of that size; none: as planned",
    )
    memory: float | None = Field(
        None,
        gt=0,
        description="GB of GPU memory for a training step, which decides patch and batch; none: the preset's",
    )
    spacing: Millimetres | None = Field(
        None, description="mm that 3d_fullres resamples to, one for all axes or (z, y, x); none: as planned"
    )
    adopt: bool = Field(
        True, description="with `training.init`: whether spacing, patch, network and normalisation are the model's"
    )


class TrainingSettings(Strict):
    """Length, sampling and arithmetic of a run."""

    epochs: Count = Field(1000, description="number of epochs; after each one a checkpoint is written")
    iterations: Count = Field(250, description="training steps of an epoch")
    validation_iterations: int = Field(
        50, ge=0, description="batches of held-out patches that are scored after each epoch; 0: no progress curve"
    )
    time_limit: Minutes | None = Field(
        None, gt=0, description="length of a fold; the learning-rate schedule fits itself to it; none: `epochs` decides"
    )
    limit_validation: bool = Field(
        True, description="whether the time limit includes the prediction of the held-out images at the end"
    )
    early_stop: Count | None = Field(
        None, description="epochs without a better held-out Dice after which the run ends; none: never before its end"
    )
    batch_size: Count | None = Field(None, description="patches in a batch; none: as planned")
    patch_size: tuple[int, ...] | None = Field(
        None, description="voxels of a patch along (z, y, x), or (y, x) for 2d; none: as planned"
    )
    patch_voxels: int | None = Field(
        None, ge=64, description="most voxels of a patch; a larger planned one is shortened; none: no limit"
    )
    batch_voxels: int | None = Field(
        None, ge=64, description="most voxels of a batch, which keeps at least two patches; none: no limit"
    )
    patch_growth: Share = Field(
        0.0, description="share of the run in which patches grow, with as many voxels in a batch; 0: full size at once"
    )
    accumulate: Count = Field(1, description="batches whose gradients make one step, as one larger batch would")
    foreground: Share = Field(
        0.33,
        description="share of the patches that are centred on a voxel of a label (oversampling); 0.33 is 1 of a batch "
        "of 2, as nnU-Net rounds it",
    )
    gradient_clip: float | None = Field(
        12.0, gt=0, description="largest norm of a gradient, to which larger ones are scaled down; none: no limit"
    )
    precision: NumberFormat = Field(
        "auto", description="number format of the network in training; auto: the fastest that is safe on this machine"
    )
    channels_last: Auto = Field(
        "auto", description="whether channels are the innermost axis in memory; auto: whichever is faster"
    )
    deep_supervision: bool = Field(
        True, description="whether the coarser stages of the decoder have outputs with a loss too"
    )
    compile: Auto = Field("auto", description="whether torch.compile translates the network; auto: on a GPU, if faster")
    cache: Cache = Field(
        "auto", description="where preprocessed cases are kept; device: on the GPU; auto: the first that has space"
    )
    workers: int | None = Field(
        None, ge=0, description="threads that prepare batches; 0: only the main thread; none: 0 on a CPU, 2 on a GPU"
    )
    seed: int | None = Field(
        None, ge=0, description="random seed; two runs on a CPU without a time limit are identical; none: a new one"
    )
    init: str | None = Field(
        None, description="model to start from: name, folder, zip or checkpoint, nnU-Net's too; none: random weights"
    )
    freeze: Part | None = Field(
        None, description="weights that are not trained; all-but-head: only the output layers are; none: all are"
    )
    teachers: tuple[str, ...] = Field(
        (), description="models of the dataset whose mean probabilities the network learns too; see `nnlite distill`"
    )
    logger: Logger = Field(
        "none", description="program that gets the metrics of each epoch too; needs the extra of that name"
    )
    max_bad_steps: Count = Field(
        20, description="steps of an epoch with a non-finite loss at which the run ends; fewer are skipped"
    )

    @model_validator(mode="before")
    @classmethod
    def _replace_old_key(cls, values: Any) -> Any:
        if isinstance(values, dict) and "tensorboard" in values:  # of older runs and recipes
            others = {key: value for key, value in values.items() if key != "tensorboard"}
            return {**others, "logger": "tensorboard"} if values["tensorboard"] else others
        return values

    @model_validator(mode="after")
    def _early_stop_has_a_score(self) -> TrainingSettings:
        if self.early_stop is not None and not self.validation_iterations:
            raise ValueError("early_stop uses the held-out Dice: it needs validation_iterations of at least 1")
        return self

    @model_validator(mode="after")
    def _frozen_weights_are_given(self) -> TrainingSettings:
        if self.freeze is not None and self.init is None:
            raise ValueError(f"--freeze {self.freeze} would keep random weights; give a model with --init")
        return self


class NetworkSettings(Strict):
    """Changes to the planned network; what is not set stays as planned."""

    features_base: Count | None = Field(
        None, description="channels of the first stage; each further stage has twice as many; none: as planned"
    )
    features_max: Count | None = Field(None, description="most channels of a stage; none: as planned")
    kernel: Literal[3, 5] | None = Field(
        None, description="size of the kernels along the axes that they span; MedNeXt has both; none: as planned"
    )
    norm: Literal["instance", "batch", "none"] | None = Field(
        None, description='normalisation after each convolution; "none": there is none; not set: as planned'
    )
    activation: Literal["leaky_relu", "relu"] | None = Field(
        None, description="activation function after each convolution; none: as planned"
    )
    factory: Factory | None = Field(
        None, description='"file.py:function", of (planned network, inputs, outputs); none: the planned U-Net'
    )


class LossSettings(Strict):
    """Weights of the terms of the loss; 0 leaves a term out."""

    cross_entropy: float = Field(1.0, ge=0, description="weight of the cross-entropy; for regions binary, of each")
    dice: float = Field(1.0, ge=0, description="weight of the soft Dice")
    top_k: float = Field(0.0, ge=0, description="weight of the cross-entropy of the voxels where it is largest")
    top_k_share: float = Field(0.1, gt=0, le=1, description="top_k: share of all voxels that these are")
    bce: float = Field(0.0, ge=0, description="weight of the binary cross-entropy of each class against the rest")
    component_dice: float = Field(
        0.0, ge=0, description="weight of the soft Dice of each connected component among the voxels nearest to it"
    )
    class_weights: Weights | None = Field(
        None, description="weight of each class in all terms, background first, or of each region; none: all equal"
    )
    distillation: Share = Field(
        0.5, description="with training.teachers: share of the loss that compares with their probabilities"
    )

    @model_validator(mode="after")
    def _has_a_term(self) -> LossSettings:
        if self.cross_entropy == self.dice == self.top_k == self.bce == self.component_dice == 0:
            raise ValueError("one of the weights must be greater than 0")
        return self


class OptimizerSettings(Strict):
    """How a step changes the weights."""

    name: Literal["sgd", "adam", "adamw", "muon"] = Field(
        "sgd", description="algorithm; sgd: with Nesterov momentum; muon: with AdamW for all but the kernels"
    )
    lr: float = Field(0.01, gt=0, description="initial learning rate, the size of a step")
    momentum: float = Field(0.99, ge=0, lt=1, description="sgd, muon: share of the last step that the next one keeps")
    weight_decay: float = Field(3e-5, ge=0, description="how much each step shrinks the weights, against overfitting")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the averaged weights, which become the model; none: the last weights do"
    )


class ScheduleSettings(Strict):
    """How the learning rate goes down. Plateau: on the moving average of the training loss, once an epoch."""

    name: Literal["poly", "cosine", "constant", "plateau"] = Field(
        "poly", description="curve of the rate; poly and cosine end at 0; plateau falls where the loss stands still"
    )
    power: float = Field(0.9, gt=0, description="poly: the rate is lr * (1 - progress) ** power")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the run in which the rate rises linearly first")
    cooldown: float = Field(
        0.0, ge=0, lt=1, description="share of the run at its end in which the rate falls linearly to 0"
    )
    patience: Count = Field(30, description="plateau: epochs without improvement after which the rate falls")
    factor: float = Field(0.2, gt=0, lt=1, description="plateau: what the rate is multiplied by when it falls")
    min_lr: float = Field(1e-6, ge=0, description="plateau: the run ends when the rate is lower")

    @model_validator(mode="after")
    def _ends_do_not_overlap(self) -> ScheduleSettings:
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup = {self.warmup:g} and cooldown = {self.cooldown:g} are more than the whole run")
        return self


class AugmentationSettings(Strict):
    """Random changes of the training patches. p_: the probability for a patch; 0 turns a transform off.

    Ranges are those from which a value is drawn for each patch, or for each of its channels.
    """

    enabled: bool = Field(True, description="whether patches are changed at all")
    pipeline: Literal["native", "batchgenerators"] = Field(
        "native", description="native: in batches, on the training device; batchgenerators: as nnU-Net v1, on the CPU"
    )
    extra: tuple[dict[str, Any], ...] = Field(
        (),
        description='batchgenerators transforms, applied last: [{name = "RicianNoiseTransform", p_per_sample = 0.1}]',
    )
    p_rotation: Share = Field(0.2, description="probability of a rotation")
    rotation: float = Field(30.0, ge=0, le=180, description="degrees either way about each axis of a 3D patch")
    rotation_in_plane: float | None = Field(
        None, ge=0, le=180, description="degrees for 2D and anisotropic patches; none: 180, for elongated 2D ones 15"
    )
    p_scaling: Share = Field(0.2, description="probability of a change of size")
    scaling: Factors = Field((0.7, 1.4), description="range of its factor; below 1 magnifies")
    p_noise: Share = Field(0.1, description="probability of Gaussian noise")
    noise_std: Deviations = Field((0.0, 0.1), description="range of its standard deviation, of normalised intensities")
    p_blur: Share = Field(0.2, description="probability of a Gaussian blur, of half of the channels")
    blur_sigma: Factors = Field((0.5, 1.0), description="range of its sigma in voxels")
    p_brightness: Share = Field(0.15, description="probability that intensities are multiplied")
    brightness: Factors = Field((0.75, 1.25), description="range of the factor")
    p_contrast: Share = Field(0.15, description="probability that distances from the mean are multiplied")
    contrast: Factors = Field((0.75, 1.25), description="range of the factor")
    p_low_resolution: Share = Field(
        0.25, description="probability of a lower resolution (down and up again), of half of the channels"
    )
    low_resolution: Shares = Field((0.5, 1.0), description="range of the share of voxels along an axis that are kept")
    p_gamma_inverted: Share = Field(0.1, description="probability of a gamma curve on inverted intensities")
    p_gamma: Share = Field(0.3, description="probability of a gamma curve: intensities to a power")
    gamma: Factors = Field((0.7, 1.5), description="range of the power, of both")
    p_mirror: Share = Field(0.5, description="probability of mirroring, for each axis")
    mirror_axes: Axes | None = Field(
        None, description="axes of the patch that are mirrored, also when predicting; none: all of them"
    )
    mirror_swap: tuple[tuple[str, str], ...] = Field(
        (), description='labels to swap when left and right are swapped: [["kidney_left", "kidney_right"]]'
    )
    mirror_swap_axis: int | None = Field(
        None, ge=0, le=2, description="axis of the patch from left to right; none: by the plan's orientation"
    )
    p_cascade_morphology: Share = Field(
        0.4, description="cascade: probability that the first stage's labels are dilated, eroded, opened or closed"
    )
    p_cascade_removal: Share = Field(
        0.2, description="cascade: probability that the first stage's labels lose a component"
    )

    def mirrored_axes(self, dimensions: int) -> tuple[int, ...]:
        """Return the axes of a patch with two or three dimensions that training mirrors."""
        if not self.enabled or self.p_mirror == 0:
            return ()
        return tuple(range(dimensions)) if self.mirror_axes is None else tuple(self.mirror_axes)


class InferenceSettings(Strict):
    """How images are predicted: held-out ones after the training, and those of `nnlite predict`."""

    step_size: float = Field(
        0.5,
        gt=0,
        le=1,
        description="distance of two windows as a share of the patch; 1: no overlap (faster, less exact)",
    )
    mirroring: bool = Field(
        True, description="whether predictions of mirrored copies are averaged, on the axes mirrored in training"
    )
    precision: NumberFormat = Field(
        "auto", description="number format of the network when predicting; auto: the fastest that is safe"
    )
    sums: Literal["float32", "float16"] = Field(
        "float32", description="number format of the sums of windows; float16: half the memory, rounded as in nnU-Net"
    )
    skip_empty: Auto = Field(
        "auto", description="whether windows of zeros are background; auto: with normalisation inside a mask"
    )
    compile: bool = Field(
        False, description="whether torch.compile translates the network; takes a minute at the start, for many images"
    )
    max_memory: float | None = Field(
        None, gt=0, description="GB that predicting may use of the machine, and of the GPU; none: 80 % of what is free"
    )


class Settings(Strict):
    """The resolved settings of a run."""

    recipe: str = "default"
    plan: PlanSettings = PlanSettings()
    training: TrainingSettings = TrainingSettings()
    network: NetworkSettings = NetworkSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    inference: InferenceSettings = InferenceSettings()

    @model_validator(mode="after")
    def _rate_is_above_the_least(self) -> Settings:
        rate, least = self.optimizer.lr, self.schedule.min_lr
        if self.schedule.name == "plateau" and rate < least:
            raise ValueError(f"optimizer.lr = {rate:g} is below schedule.min_lr = {least:g}, where plateau ends a run")
        return self

    @model_validator(mode="after")
    def _probabilities_can_follow(self) -> Settings:
        changes = self.augmentation
        if self.training.teachers and (changes.pipeline != "native" or changes.extra):
            raise ValueError("training.teachers needs augmentation.pipeline = native, and no augmentation.extra")
        return self


# ------------------------------------------------------------------------------------------ resolving settings


def recipe_folder() -> Path:
    """Return configs/, next to the package in a checkout, and inside it in an installed wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def recipes() -> dict[str, Path]:
    """Return name and file of the recipes of the package; ablations are named `ablations/batch_norm`."""
    folder = recipe_folder()
    found = (path for path in sorted(folder.rglob("*.toml")) if path.parent.name != "cluster")
    return {str(p.relative_to(folder).with_suffix("")): p for p in found}


def load_settings(recipe: str = "default", changes: Mapping[str, Any] | None = None) -> Settings:
    """Resolve a recipe and changes on top of it.

    Parameters
    ----------
    recipe : str
        Name of a recipe, or a TOML file.
    changes : mapping, optional
        Key to value, such as {"optimizer.lr": 0.001}. Text is read as a TOML value if it is one. A length takes the
        place of the recipe's, in a recipe that of its base: with "training.epochs" alone there is no time limit.

    Raises
    ------
    UserError
        The recipe or a key is unknown (names the nearest), the TOML is bad (line and column), or a value is illegal.
    """
    return with_changes(_read_recipe(_recipe_path(recipe)), _replacing_length(changes or {}))


def with_changes(settings: Settings, changes: Mapping[str, Any], sections: tuple[str, ...] | None = None) -> Settings:
    """Return the settings with some keys replaced.

    Parameters
    ----------
    settings : Settings
        The settings to change.
    changes : mapping
        As for `load_settings`.
    sections : tuple of str, optional
        The only sections that may be changed, for a step that reads no others.

    Raises
    ------
    UserError
        A key is unknown or of another section, or a value is illegal.
    """
    for key in changes:
        if sections is not None and key in keys() and key.split(".")[0] not in sections:
            legal = [k for k in keys() if k.split(".")[0] in sections]
            raise UserError(f"{key} is no setting of {' or '.join(sections)}", fix=f"There are: {', '.join(legal)}.")
    return _validated(settings, {key: _parse(key, value) for key, value in changes.items()}, None)


def differences(old: Settings, new: Settings) -> list[str]:
    """Return the differences of two runs' settings, one `key: old -> new` for each key."""
    before, after = (dict(flatten(json.loads(s.model_dump_json(exclude={"recipe"})))) for s in (old, new))
    changed = changed_values(before, after)
    return [f"{key}: {_as_typed(key, one)} -> {_as_typed(key, other)}" for key, (one, other) in changed.items()]


def _as_typed(key: str, value: Any) -> Any:
    """Return a value as a user writes it: the minutes of a time limit with a unit."""
    return time_text(value) if key == "training.time_limit" and value is not None else value


def keys() -> list[str]:
    """Return every key that a recipe or `--set` may name."""
    return [key for key, _ in flatten(Settings().model_dump(exclude={"recipe"}))]


def _recipe_path(recipe: str, folder: Path | None = None) -> Path:
    """Return the file of a recipe: one in the folder of the recipe that builds on it, a name, or a path."""
    if folder is not None and (folder / recipe).is_file():
        return folder / recipe
    known = recipes()
    by_stem = {Path(name).name: path for name, path in known.items()}
    path = known.get(recipe) or by_stem.get(recipe) or expand_home(recipe)
    if not path.is_file():
        raise UserError(f"there is no recipe {recipe!r}", fix=f"{suggest(recipe, known, 0.5)} Or give a TOML file.")
    return path


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> Settings:
    """Return the settings of a recipe file; `above` are the files that build on it."""
    if path in above:
        raise UserError("builds on itself", path, "Give another base.")
    try:
        tree = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"invalid TOML: {error}", path) from None
    base = tree.pop("base", None)
    start = Settings() if base is None else _read_recipe(_recipe_path(str(base), path.parent), (*above, path))
    values = _replacing_length(dict(flatten(tree)))
    return _validated(start.model_copy(update={"recipe": path.stem}), values, path)


def _replacing_length(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values without the time limit of what they change if they give a number of epochs."""
    length = {"training.time_limit": None} if "training.epochs" in values else {}
    return {**length, **values}


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the values of a tree with their dotted keys; an entry of a list has its number for a key."""
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            yield from flatten(dict(enumerate(value)), f"{prefix}{key}.")
        elif isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed_values(before: Mapping[_Key, Any], after: Mapping[_Key, Any]) -> dict[_Key, tuple[Any, Any]]:
    """Return the old and the new value of each key where they differ, for messages; None where a key is missing."""
    values = {key: (before.get(key), after.get(key)) for key in dict.fromkeys((*before, *after))}
    pairs = {key: (old, new) for key, (old, new) in values.items() if old != new}
    rounded = {key: (_rounded(old), _rounded(new)) for key, (old, new) in pairs.items()}
    return {key: short if short[0] != short[1] else pairs[key] for key, short in rounded.items()}


def _rounded(value: Any) -> Any:
    """Round a number, or those in a list, to the six digits that `:g` prints."""
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:g}") if isinstance(value, float) else value


def _parse(key: str, value: Any) -> Any:
    """Return text as a TOML value if it is one (3e-4, true, [40, 56, 40]), "none" as None, other text unchanged."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "null"):
        return "none" if key in ("network.norm", "training.logger") else None  # there it is the name of a choice
    try:
        return tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return value


def _suggest_keys(key: str) -> str:
    """Return the key that an unknown one is most like, with its section or without; several if none is much like it."""

    def likeness(known: str) -> float:
        return max(SequenceMatcher(None, key, name).ratio() for name in (known, known.split(".")[1]))

    if key == "network.kind":
        return "The network is planned: --set plan.preset=mednext_s, or another preset of `nnlite plan --help`."
    near = sorted(keys(), key=likeness, reverse=True)[:3]
    return f"Did you mean {near[0]!r}?" if likeness(near[0]) >= 0.6 else f"The nearest are {', '.join(near)}."


def _validated(base: Settings, values: dict[str, Any], file: Path | None) -> Settings:
    """Return `base` with the values of some keys replaced; they come from `file`, or from options if it is None."""
    known = keys()
    tree: dict[str, Any] = base.model_dump(exclude_unset=True)  # `model_fields_set` says later what was given
    for key, value in values.items():
        if key not in known and key != "training.tensorboard":
            raise UserError(f"unknown setting {key!r}", file, _suggest_keys(key))
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        what, place = problem["msg"].removeprefix("Value error, "), problem["loc"][:2]
        given: Any = tree
        for part in place:  # deeper parts are entries of a value that is shown whole
            given = given[part]
        value = f" = {given!r}" if len(place) > 1 else ""  # a whole section would not be read
        raise UserError(f"{'.'.join(map(str, place))}{value}: {what}" if place else what, file) from None
