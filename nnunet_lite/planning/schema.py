"""The contract of plans.json, which every later step reads.

`Plan` has one `Configuration` per network, and that has a `Network`. pydantic validates a file that was edited by hand;
an error names the place in the file, the value and what is legal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import html_table
from nnunet_lite.errors import UserError
from nnunet_lite.files import must_be, read_json, validated
from nnunet_lite.planning.show import plan_head, plan_reasons, plan_rows, plan_table, plan_title
from nnunet_lite.settings import Millimetres, Strict, changed_values, flatten

Positive = Annotated[int, Field(gt=0)]
KernelSize = Annotated[Positive, must_be("odd, or the kernel would have no centre", lambda size: size % 2)]
SplineOrder = Annotated[int, Field(ge=0, le=5)]
Orientation = Annotated[
    str, must_be("one letter each of L or R, A or P, S or I, such as LAS", lambda letters: _sides(letters) == [0, 1, 2])
]
AxisOrder = Annotated[tuple[int, int, int], must_be("a permutation of 0, 1, 2", lambda axes: sorted(axes) == [0, 1, 2])]
Length = Annotated[float, Field(gt=0)]
Percent = Annotated[float, Field(ge=0, le=100)]
Percentiles = Annotated[tuple[Percent, Percent], must_be("two numbers, the lower first", lambda p: p[0] < p[1])]
Scheme = Literal["ct", "zscore", "none", "rescale_0_1", "rgb_0_1"]
Precision = Literal["float16", "float32"]
Kind = Literal["plain", "residual", "mednext_s", "mednext_b", "mednext_m", "mednext_l"]


class Normalization(NamedTuple):
    """A normalisation: the channel name that chooses it (in lower case), nnU-Net's class, words, how it is stored."""

    channel_name: str
    nnunet: str
    words: str
    stored_as: Precision


NORMALIZATIONS: dict[Scheme, Normalization] = {  # the arithmetic is in preprocessing/normalization.py
    "ct": Normalization("ct", "CTNormalization", "CT", "float16"),
    "zscore": Normalization("zscore", "ZScoreNormalization", "z-score", "float16"),
    "none": Normalization("nonorm", "NoNormalization", "as it is", "float32"),
    "rescale_0_1": Normalization("rescale_to_0_1", "RescaleTo01Normalization", "to 0..1", "float32"),
    "rgb_0_1": Normalization("rgb_to_0_1", "RGBTo01Normalization", "RGB to 0..1", "float16"),
}


def _sides(letters: str) -> list[int]:
    return sorted("LRAPSI".find(letter) // 2 for letter in letters)


class Statistics(Strict):
    """Intensities of one channel over the foreground voxels of the training set."""

    mean: float = Field(description="mean, which `ct` subtracts")
    median: float = Field(description="median")
    std: float = Field(description="standard deviation, by which `ct` divides")
    min: float = Field(description="smallest value")
    max: float = Field(description="largest value")
    percentile_00_5: float = Field(description="percentile 0.5, to which `ct` raises lower values")
    percentile_99_5: float = Field(description="percentile 99.5, to which `ct` lowers higher values")


class Channel(Strict):
    """One input channel: how it is normalised, and whether only inside the nonzero mask."""

    name: str = Field(description="name in dataset.json, which chooses the normalisation")
    normalization: Scheme = Field(description="how intensities are normalised")
    use_mask: bool = Field(False, description="whether only voxels inside the nonzero mask of an image are normalised")
    clip_percentiles: Percentiles | None = Field(None, description="of each image, before normalisation")
    statistics: Statistics = Field(description="intensities of the training set")

    def to_text(self) -> str:
        """Say how the channel is normalised."""
        inside = " inside the nonzero mask" if self.use_mask else ""
        return f"{NORMALIZATIONS[self.normalization].words}{inside}"

    @property
    def statistics_used(self) -> dict[str, float] | None:
        """The statistics of the training set where images are normalised with them; otherwise None."""
        return self.statistics.model_dump() if self.normalization == "ct" else None


def exact_storage(channels: Iterable[Channel]) -> Precision:
    """Return the type that stores normalised images as exactly as they are needed.

    float16 has 11 bits: an error of at most 2^-12 of a value. That is little of a value that counts in standard
    deviations from the mean, and of a byte; raw 16-bit values would be off by up to 16.

    Parameters
    ----------
    channels : iterable of Channel
        The channels of the images.

    Returns
    -------
    {"float16", "float32"}
        float32 where a channel is not standardised.
    """
    kinds = {NORMALIZATIONS[channel.normalization].stored_as for channel in channels}
    return "float32" if "float32" in kinds else "float16"


class Network(Strict):
    """A U-Net, from the finest stage to the bottleneck. Kernels and strides are per stage and axis (z, y, x)."""

    kind: Kind = Field("plain", description="blocks: of the encoder, or of all stages of a MedNeXt and its size")
    features: tuple[Positive, ...] = Field(min_length=1, description="channels of each stage")
    strides: tuple[tuple[Positive, ...], ...] = Field(description="step from the stage before; the first one's is 1")
    kernels: tuple[tuple[KernelSize, ...], ...] = Field(description="size of the convolutions of each stage, odd")
    blocks: tuple[Positive, ...] = Field(description="convolutions (plain) or blocks per encoder stage")
    decoder_convolutions: tuple[Positive, ...] = Field(
        description="convolutions, or MedNeXt blocks, per decoder stage, finest last"
    )
    norm: Literal["instance", "batch", "none"] = Field("instance", description="normalisation after each convolution")
    activation: Literal["leaky_relu", "relu", "gelu"] = Field("leaky_relu", description="activation function")

    @model_validator(mode="after")
    def _same_length(self) -> Network:
        n = len(self.features)
        for field, needed in {"strides": n, "kernels": n, "blocks": n, "decoder_convolutions": n - 1}.items():
            if (entries := len(getattr(self, field))) != needed:
                raise ValueError(f"{field} has {entries} entries for {n} stages, {needed} are needed")
        return self

    @property
    def divisor(self) -> tuple[int, ...]:
        """What each axis of a patch must be divisible by."""
        return tuple(prod(axis) for axis in zip(*self.strides, strict=True))


class Resampling(Strict):
    """Spline orders of resampling: 0 is the nearest voxel, 1 linear, 3 cubic."""

    image_order: SplineOrder = Field(3, description="images")
    image_order_z: SplineOrder = Field(0, description="images, along the coarse axis where slices are resampled")
    label_order: SplineOrder = Field(1, description="label maps, each label by itself")
    label_order_z: SplineOrder = Field(0, description="label maps, along that axis")
    logits_order: SplineOrder = Field(1, description="outputs of the network, back to the grid of the image")
    logits_order_z: SplineOrder = Field(0, description="outputs of the network, along that axis")
    separate_z: bool | None = Field(
        None, description="whether slices are resampled one by one; null: where one spacing is over 3 times another"
    )


class Configuration(Strict):
    """One network and the data it sees. Two-dimensional configurations have spacing, patch and kernels of (y, x)."""

    spacing: tuple[Length, ...] = Field(description="target spacing in mm, transposed axis order")
    median_shape: tuple[Length, ...] = Field(description="median shape in voxels at that spacing")
    patch_size: tuple[Positive, ...] = Field(description="voxels of a patch")
    batch_size: Positive = Field(description="patches in a batch")
    network: Network = Field(description="the U-Net")
    batch_dice: bool = Field(description="whether the Dice loss is that of the whole batch, not the mean over patches")
    resampling: Resampling = Field(Resampling(), description="spline orders")
    previous_stage: str | None = Field(None, description="of a cascade: the configuration whose label maps it refines")
    memory_gb: float | None = Field(None, description="predicted memory of a training step, GB (1e9 bytes)")
    reasons: tuple[str, ...] = Field((), description="which rules decided")

    @property
    def dimensions(self) -> int:
        return len(self.patch_size)

    @property
    def first_convolution(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape (batch, channels, *patch) of the first convolutions, and the size of their kernel."""
        return (self.batch_size, self.network.features[0], *self.patch_size), self.network.kernels[0]

    @model_validator(mode="after")
    def _fits_its_network(self) -> Configuration:
        axes = len(self.patch_size)
        if axes not in (2, 3):
            raise ValueError(f"patch_size = {list(self.patch_size)} must have two or three axes")
        per_axis: dict[str, tuple[float, ...]] = {"spacing": self.spacing, "median_shape": self.median_shape}
        for stage, (stride, kernel) in enumerate(zip(self.network.strides, self.network.kernels, strict=True)):
            per_axis |= {f"network.strides[{stage}]": stride, f"network.kernels[{stage}]": kernel}
        for name, numbers in per_axis.items():
            if len(numbers) != axes:
                raise ValueError(f"{name} = {list(numbers)} must have {axes} numbers, one per axis of the patch")
        if max(first := self.network.strides[0]) > 1:
            what = f"network.strides[0] = {list(first)} must be all 1"
            raise ValueError(f"{what}: the first stage has the resolution of the patch")
        for axis, (size, d) in enumerate(zip(self.patch_size, self.network.divisor, strict=True)):
            if size % d:
                what = f"patch_size[{axis}] = {size} cannot be pooled: it must be a multiple of {d}"
                raise ValueError(f"{what}; the nearest are {max(d, size // d * d)} and {size // d * d + d}")
        normalised = {"instance": 1, "batch": self.batch_size, "none": 2}[self.network.norm]  # values, at one voxel
        if 1 < prod(self.patch_size) == prod(self.network.divisor) and normalised == 1:
            what = f"patch_size = {list(self.patch_size)} leaves one voxel in the coarsest stage, which becomes 0"
            raise ValueError(f"{what} when normalised; make it larger, or the strides smaller")
        return self


class Sizes(Strict):
    """The sizes that the options of `nnlite plan` give one configuration instead of the planned ones."""

    patch_size: tuple[Positive, ...] | None = Field(None, description="of `--patch-size`")
    batch_size: Positive | None = Field(None, description="of `--batch-size`")


class Options(Strict):
    """The options of `nnlite plan` that shape a plan; None where one was not given."""

    preset: str | None = Field(None, description="of `--preset`")
    memory_gb: Length | None = Field(None, description="of `--memory`")
    spacing: Millimetres | None = Field(None, description="of `--spacing`: mm along all axes, or (z, y, x)")
    adopted: str | None = Field(None, description="the plans.json that was adopted instead of planning")
    sizes: dict[str, Sizes] = Field({}, description="by configuration")
    clip_percentiles: Percentiles | None = Field(None, description="of `--clip-percentiles`")
    stored_as: Precision | None = Field(None, description="of `--store`")

    @property
    def changes_rules(self) -> bool:
        """Whether an option is given from which all configurations follow."""
        return (self.preset, self.memory_gb, self.spacing) != (None, None, None)

    @classmethod
    def check(cls, **options: Any) -> Options:
        """Return the options of a call.

        Raises
        ------
        UserError
            One of them is illegal.
        """
        with validated():
            return cls.model_validate(options)


class Plan(Strict):
    """Everything that preprocessing, training and inference need to know of a dataset."""

    format: Literal["nnlite-plan-1"] = Field("nnlite-plan-1", description="version of this contract")
    dataset: str = Field(description="name of the dataset")
    options: Options | None = Field(None, description="it was made with these, and is planned again with them")
    preset: str = Field("default", description="the U-Net that was planned, such as default, resenc_m or mednext_s")
    memory_gb: float = Field(8, gt=0, description="GPU memory budget in GB")
    orientation: Orientation | None = Field(None, description='where x, y, z point after reading, such as "LAS"')
    axis_order: AxisOrder = Field((0, 1, 2), description="transposition applied to (z, y, x)")
    median_spacing: tuple[Length, Length, Length] = Field(description="of the raw images, transposed, mm")
    median_shape: tuple[Length, Length, Length] = Field(description="of the cropped raw images, transposed, voxels")
    channels: tuple[Channel, ...] = Field(min_length=1, description="the input channels, in the order of the files")
    labels: Labels = Field(description="names and values, those of dataset.json")
    n_cases: int = Field(0, description="number of training cases")
    stored_as: Precision = Field(
        default_factory=lambda data: exact_storage(data.get("channels", ())),
        description="type of preprocessed images on disk; default: float32 where a channel is not standardised",
    )
    configurations: dict[str, Configuration] = Field(min_length=1, description='by name; one may have "inherits_from"')

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        given = values.get("configurations") if isinstance(values, dict) else None
        if not isinstance(given, dict) or not all(isinstance(c, dict) for c in given.values()):
            return values
        return {**values, "configurations": {name: inherited(given, name) for name in given}}

    @model_validator(mode="after")
    def _names_are_legal(self) -> Plan:
        for name, configuration in self.configurations.items():
            if not name or Path(name).name != name or name.startswith("."):  # files are called so
                raise ValueError(f"configurations has the name {name!r}; use letters, digits, '-' and '_'")
            others, previous = [other for other in self.configurations if other != name], configuration.previous_stage
            if previous not in (None, *others):
                what = f"configurations.{name}.previous_stage = {previous!r} is no other configuration"
                raise ValueError(f"{what}; there are: {', '.join(others) or 'none'}")
        return self

    def configuration(self, name: str) -> Configuration:
        """Return the configuration of a name.

        Raises
        ------
        UserError
            The plan has none of that name.
        """
        if name not in self.configurations:
            what = f"the plan of {self.dataset} has no configuration {name!r}"
            raise UserError(what, fix=f"It has: {', '.join(self.configurations)}.")
        return self.configurations[name]

    def with_configuration(self, name: str, configuration: Configuration) -> Plan:
        """Return the plan with another configuration of a name."""
        return self.model_copy(update={"configurations": {**self.configurations, name: configuration}})

    def n_inputs(self, configuration: str) -> int:
        """Count a network's input channels: the image's and, after a previous stage, one per foreground class."""
        second = self.configuration(configuration).previous_stage is not None
        return len(self.channels) + (self.labels.n_classes - 1 if second else 0)

    def input_values(self, configuration: str) -> dict[str, Any]:
        """Return what the networks of a configuration expect of images, by dotted key; stored with weights."""
        names: Any = {"channels": {"__all__": {"name"}}}
        content = self.model_dump(mode="json", include={"orientation", "axis_order", "channels"}, exclude=names)
        for channel, entry in zip(self.channels, content["channels"], strict=True):
            entry["statistics"] = channel.statistics_used
        return dict(flatten({**content, "spacing": list(self.configuration(configuration).spacing)}))

    def to_json(self) -> str:
        """Return the text of plans.json."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of plans.json, without options where there are none, as in a model folder."""
        content = self.model_dump(mode="json", exclude={"options"} if self.options is None else None)
        if self.options is not None and self.options.spacing is None:
            del content["options"]["spacing"]  # an older nnlite reads plans that do without it
        return content

    def trains_as(self, other: Plan) -> bool:
        """Whether both plans give the same arrays and networks."""
        return not self.differences(other)

    def differences(self, other: Plan) -> list[str]:
        """Return what another plan trains otherwise, such as "configurations.2d.batch_size: 2 -> 3".

        Explanations, the predicted memory, the names of labels, and statistics that no image is normalised with do not
        count.
        """
        unused: Any = {"options": True, "configurations": {"__all__": {"reasons", "memory_gb"}}}

        def values(plan: Plan) -> dict[str, Any]:
            content = plan.model_dump(mode="json", exclude=unused)
            for configuration in content["configurations"].values():  # runs before December 2026 rounded an adopted one
                configuration["median_shape"] = [round(n) for n in configuration["median_shape"]]
            for channel, entry in zip(plan.channels, content["channels"], strict=True):
                if channel.statistics_used is None:
                    del entry["statistics"]
            return dict(flatten({**content, "labels": plan.labels.meaning}))

        changed = changed_values(values(self), values(other))
        return [f"{key}: {before} -> {after}" for key, (before, after) in changed.items()]

    def to_text(self) -> str:
        """Return the plan as a table for a terminal."""
        return plan_table(self)

    def __repr__(self) -> str:
        return f"{plan_title(self)}\nconfigurations: {', '.join(self.configurations)}"

    @property
    def brief(self) -> str:
        """What `--quiet` prints."""
        return repr(self)

    def _repr_html_(self) -> str:
        reasons = [f"{name}: {reason}" for name, reasons in plan_reasons(self).items() for reason in reasons]
        return html_table([plan_head(self), *plan_rows(self)], [plan_title(self), *reasons])

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read and validate a plans.json.

        Raises
        ------
        UserError
            There is no such file, it is no JSON, or a value is illegal. The message names its place in the file and
            what is legal.
        """
        if not path.is_file():
            raise UserError("there is no plan", path, "Run `nnlite plan DATA` first.")
        with validated(path, fix="Correct it, or run `nnlite plan` again."):
            return cls.model_validate(read_json(path))


def configuration_content(configuration: Configuration) -> dict[str, Any]:
    """Return the content of a configuration without its explanations and its predicted memory."""
    return configuration.model_dump(mode="json", exclude={"reasons", "memory_gb"})


def configuration_changes(old: Configuration, new: Configuration) -> dict[str, tuple[Any, Any]]:
    """Return how two configurations differ: by the keys of plans.json, the old and the new value."""
    contents = map(configuration_content, (old, new))
    return changed_values(*({**content, **content["network"], "network": None} for content in contents))


def inherited(configurations: Mapping[str, dict[str, Any]], name: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a configuration with everything that it inherits from others.

    Parameters
    ----------
    configurations : mapping of str to dict
        All configurations, as a file has them.
    name : str
        The configuration.
    heirs : tuple of str
        The configurations that inherit from it, to find circles.

    Returns
    -------
    dict
        The whole configuration.

    Raises
    ------
    ValueError
        It inherits from itself, or from one that does not exist. The message begins with its place in the file.
    """
    where = f"configurations.{(*heirs, name)[0]}.inherits_from"
    if name in heirs:
        raise ValueError(f"{where} goes in a circle: {' -> '.join((*heirs, name))}")
    if not isinstance(name, str) or name not in configurations:
        raise ValueError(f"{where} {name!r}, which does not exist; there are: {', '.join(configurations)}")
    own = configurations[name]
    if "inherits_from" not in own:
        return dict(own)
    base = inherited(configurations, own["inherits_from"], (*heirs, name))
    return {**base, **{key: value for key, value in own.items() if key != "inherits_from"}}
