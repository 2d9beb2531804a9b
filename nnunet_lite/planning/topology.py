"""How deep a U-Net for a patch is, where it pools, with which kernels, and how many feature-map values it has.

The rules are those of nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z): an axis is pooled while it is long
enough and sampled about as finely as the finest axis; a kernel spans an axis from the resolution on at which the voxels
are about isotropic. MedNeXt (Roy et al. 2023, arXiv:2303.09975) follows them up to its four downsamplings. All of it is
arithmetic over a few integers; no network is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod

from nnunet_lite.planning.schema import Kind, Network

MIN_EDGE = 4  # no axis is pooled below this length
BASE_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}
MEDNEXT_STAGES = 5
# Per stage, deeper ones as the last: convolutions (plain) or blocks of the encoder; expansion ratios of MedNeXt.
BLOCKS: dict[Kind, tuple[int, ...]] = {
    "plain": (2,),
    "residual": (1, 3, 4, 6),
    "mednext_s": (2,),
    "mednext_b": (2,),
    "mednext_m": (3, 4),
    "mednext_l": (3, 4, 8),
}
EXPANSION: dict[Kind, tuple[int, ...]] = {
    "mednext_s": (2,),
    "mednext_b": (2, 3, 4),
    "mednext_m": (2, 3, 4),
    "mednext_l": (3, 4, 8),
}


@dataclass(frozen=True)
class Topology:
    """Strides and kernels of a U-Net.

    Parameters
    ----------
    patch : tuple of int
        Voxels per axis, padded to a multiple of `divisor`.
    strides, kernels : tuple of tuple of int
        Per stage and axis, the finest stage first.
    """

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """What each axis of the patch is a multiple of."""
        return tuple(prod(axis) for axis in zip(*self.strides, strict=True))


def topology_of(spacing: Sequence[float], patch: Sequence[float], kind: Kind = "plain") -> Topology:
    """Return the topology for a patch.

    Parameters
    ----------
    spacing : sequence of float
        mm per axis, (z, y, x) or (y, x).
    patch : sequence of float
        Voxels per axis. It may be fractional (a median of shapes), and is padded up to a multiple of the divisor.
    kind : {"plain", "residual", "mednext_s", "mednext_b", "mednext_m", "mednext_l"}
        Kind of network.

    Returns
    -------
    Topology
        Strides, kernels and the padded patch.
    """
    axes = range(len(patch))
    edge, sampling, kernel = list(patch), list(spacing), [1] * len(patch)
    strides, kernels = [(1,) * len(patch)], []
    while (kind not in EXPANSION or len(strides) < MEDNEXT_STAGES) and (pooled := _axes_to_pool(edge, sampling)):
        # Once a kernel spans an axis it does so in all deeper stages, even where other axes become finer again.
        kernel = [3 if kernel[a] == 3 or sampling[a] < 2 * min(sampling) else 1 for a in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if a in pooled else 1 for a in axes))
        for a in pooled:
            edge[a], sampling[a] = ceil(edge[a] / 2), sampling[a] * 2
    kernels.append((3,) * len(patch))
    divisor = [prod(axis) for axis in zip(*strides, strict=True)]
    padded = tuple(ceil(n / d) * d for n, d in zip(patch, divisor, strict=True))
    return Topology(padded, tuple(strides), tuple(kernels))


def _axes_to_pool(edge: Sequence[float], sampling: Sequence[float]) -> list[int]:
    """The axes to halve next: long enough, and within a factor two of the finest among those that are."""
    long_enough = [a for a, n in enumerate(edge) if n >= 2 * MIN_EDGE]
    if not long_enough:
        return []
    finest = min(sampling[a] for a in long_enough)
    pooled = [a for a in long_enough if sampling[a] / finest < 2]
    # A stage that halves a single axis is only worth it where that axis is still clearly too long.
    return [] if len(pooled) == 1 and edge[pooled[0]] < 3 * MIN_EDGE else pooled


def shorten_patch(topology: Topology, spacing: Sequence[float], median: Sequence[float], kind: Kind) -> Topology | None:
    """Return the topology of the next smaller patch.

    The axis that is longest relative to the median image loses its divisor. A shorter axis may be pooled once less and
    then needs only half the step: 128 goes to 112, not to 96.

    Parameters
    ----------
    topology : Topology
        The patch to shorten.
    spacing : sequence of float
        mm per axis.
    median : sequence of float
        Median shape of the images in voxels.
    kind : Kind
        Kind of network.

    Returns
    -------
    Topology or None
        None where no voxel would be left.
    """
    axis = max(range(len(topology.patch)), key=lambda a: (topology.patch[a] / median[a], a))
    smaller = list(topology.patch)
    smaller[axis] -= topology.divisor[axis]
    if smaller[axis] < 1:
        return None
    smaller[axis] = topology.patch[axis] - topology_of(spacing, smaller, kind).divisor[axis]
    return topology_of(spacing, smaller, kind)


def neighbouring_patches(
    spacing: Sequence[float], patch: Sequence[int], kind: Kind = "plain"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the nearest patches below and above that can be pooled by the topology they get.

    Parameters
    ----------
    spacing : sequence of float
        mm per axis.
    patch : sequence of int
        Voxels per axis.
    kind : Kind
        Kind of network.

    Returns
    -------
    tuple of two tuples of int
        The patch below and the patch above.
    """
    above = topology_of(spacing, patch, kind)
    while above.patch != (padded := topology_of(spacing, above.patch, kind)).patch:
        above = padded
    below = tuple(patch)
    while (topology := topology_of(spacing, below, kind)).patch != below:
        below = tuple(n // d * d for n, d in zip(below, topology.divisor, strict=True))
    return below, above.patch


def join_by_x(sizes: Iterable[float]) -> str:
    """Return sizes as text, such as "40x56x40"."""
    return "x".join(f"{size:g}" for size in sizes)


def default_features(kind: Kind, stages: int, dimensions: int, base: int = BASE_FEATURES) -> tuple[int, ...]:
    """Return the features per stage: they double from `base`, for a U-Net up to 320 (3D) or 512 (2D)."""
    most = base << MEDNEXT_STAGES if kind in EXPANSION else max(base, MAX_FEATURES[dimensions])
    return tuple(min(base << stage, most) for stage in range(stages))


def per_stage(values: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Return a value for each stage: those given, and the last one for deeper stages."""
    return (values + values[-1:] * stages)[:stages]


def default_network(kind: Kind, topology: Topology) -> Network:
    """Return the network for a topology: nnU-Net's, or the MedNeXt of that size with kernels of 3."""
    stages = len(topology.strides)
    blocks = per_stage(BLOCKS[kind], stages)
    decoder = {"plain": (2,) * (stages - 1), "residual": (1,) * (stages - 1)}
    return Network(
        kind=kind,
        features=default_features(kind, stages, len(topology.patch)),
        strides=topology.strides,
        kernels=topology.kernels,
        blocks=blocks,
        decoder_convolutions=decoder.get(kind, blocks[-2::-1]),
        activation="gelu" if kind in EXPANSION else "leaky_relu",
    )


def resize_kernels(kernels: Sequence[Sequence[int]], size: int) -> tuple[tuple[int, ...], ...]:
    """Return the kernels with another size along the axes that they span."""
    return tuple(tuple(size if n > 1 else 1 for n in kernel) for kernel in kernels)


def voxels_per_stage(strides: Sequence[Sequence[int]], patch: Sequence[int]) -> list[int]:
    """Return the voxels of the feature maps of each stage; the patch must be a multiple of the divisor."""
    out, voxels = [], prod(patch)
    for stride in strides:
        voxels //= prod(stride)
        out.append(voxels)
    return out


def feature_map_count(kind: Kind, topology: Topology, outputs: int) -> int:
    """Count the values in all feature maps of nnU-Net's network for one patch.

    nnU-Net's memory budget counts the output of every convolution (also transposed ones and projections) and of the
    last segmentation head.

    Parameters
    ----------
    kind : {"plain", "residual"}
        The encoder's blocks.
    topology : Topology
        Patch, strides and kernels.
    outputs : int
        Entries in the labels of the dataset, background and ignore included.

    Returns
    -------
    int
        The number of values.
    """
    stages = len(topology.strides)
    features = default_features(kind, stages, len(topology.patch))
    sizes = [n * voxels for n, voxels in zip(features, voxels_per_stage(topology.strides, topology.patch), strict=True)]
    encoder = sum(n * size for n, size in zip(per_stage(BLOCKS[kind], stages), sizes, strict=True))
    decoder = 3 * sum(sizes[:-1])
    if kind == "residual":
        # The stem; two convolutions per block; a projection wherever a stage changes size or features.
        encoder, decoder = sizes[0] + 2 * encoder + sum(sizes[1:]), 2 * sum(sizes[:-1])
    head = outputs * prod(topology.patch) if stages > 1 else 0  # heads sit on decoder stages
    return encoder + decoder + head
