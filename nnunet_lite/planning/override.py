"""A plan with a patch or batch size that the user chose, checked."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from nnunet_lite.errors import UserError
from nnunet_lite.planning.memory import with_memory
from nnunet_lite.planning.schema import Configuration, Network, Plan
from nnunet_lite.planning.topology import Topology, default_features, default_network, shortened, topology


def override(
    plan: Plan, configuration_name: str, patch_size: Sequence[int] | None = None, batch_size: int | None = None
) -> Plan:
    """The plan with another patch or batch size for one configuration.

    A new patch gets the topology that nnU-Net's rule gives it; features and blocks of stages that stay are kept.

    Raises
    ------
    UserError : no such configuration, a batch below 1, or a patch that cannot be pooled (names the nearest legal ones).
    """
    changed = plan.configuration(configuration_name)
    if patch_size is not None and tuple(patch_size) != changed.patch_size:
        changed = _with_patch(changed, tuple(patch_size))
    if batch_size is not None and batch_size != changed.batch_size:
        if batch_size < 1:
            raise UserError(f"a batch size of {batch_size} is not possible", fix="Give 1 or more.")
        changed = changed.model_copy(update={"batch_size": batch_size})
        changed = _explained(changed, f"batch {batch_size}")
    changed = with_memory(changed, len(plan.channels), plan.labels)
    return plan.model_copy(update={"configurations": {**plan.configurations, configuration_name: changed}})


def limited(
    plan: Plan, configuration_name: str, patch_voxels: int | None = None, batch_voxels: int | None = None
) -> Plan:
    """The plan with a patch of at most so many voxels, shortened as the planner does it; likewise a batch.

    A batch keeps at least two patches. What is within the limits stays as it is.
    """
    c = plan.configuration(configuration_name)
    shape = topology(c.spacing, c.patch_size)
    while patch_voxels is not None and prod(shape.patch) > patch_voxels:
        smaller = shortened(shape, c.spacing, c.median_shape)
        if smaller is None or len(smaller.strides) == 1:
            break
        shape = smaller
    patch = shape.patch if patch_voxels is not None and prod(c.patch_size) > patch_voxels else c.patch_size
    batch = c.batch_size
    if batch_voxels is not None:
        batch = min(batch, max(2, batch_voxels // prod(patch)))
    return override(plan, configuration_name, patch, batch)


def _with_patch(configuration: Configuration, patch: tuple[int, ...]) -> Configuration:
    dimensions = configuration.dimensions
    if len(patch) != dimensions or min(patch) < 1:
        raise UserError(f"patch size {_by(patch)} is no patch", fix=f"Give {dimensions} positive numbers of voxels.")
    shape = topology(configuration.spacing, patch)
    if shape.patch != patch:
        below, above = legal_neighbours(configuration.spacing, patch)
        raise UserError(
            f"patch size {_by(patch)} cannot be pooled: it must be a multiple of {_by(shape.divisor)}",
            fix=f"The nearest are {_by(below)} and {_by(above)}.",
        )
    if len(shape.strides) == 1:
        raise UserError(f"patch size {_by(patch)} is too small to pool", fix="Give at least 8 voxels along an axis.")
    network = _stretched(configuration.network, shape)
    changed = configuration.model_copy(update={"patch_size": patch, "network": network})
    return _explained(changed, f"patch {_by(patch)}")


def legal_neighbours(spacing: Sequence[float], patch: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The nearest patches below and above that can be pooled by the topology they get."""
    above = topology(spacing, patch)
    while above.patch != (padded := topology(spacing, above.patch)).patch:
        above = padded
    below = tuple(patch)
    while (shape := topology(spacing, below)).patch != below:
        below = tuple(n // d * d for n, d in zip(below, shape.divisor, strict=True))
    return below, above.patch


def _stretched(network: Network, shape: Topology) -> Network:
    """The network for another topology: what it had for the stages that both have, nnU-Net's rule for deeper ones."""
    stages, old = len(shape.strides), len(network.features)
    rule = default_network(network.kind, shape)
    features = default_features(stages, len(shape.patch), base=network.features[0])
    decoder = (rule.decoder_convolutions + network.decoder_convolutions)[-(stages - 1) :]
    return network.model_copy(
        update={
            "features": (network.features + features[old:])[:stages],
            "strides": shape.strides,
            "kernels": shape.kernels,
            "blocks": (network.blocks + rule.blocks[old:])[:stages],
            "decoder_convolutions": decoder,
        }
    )


def _explained(configuration: Configuration, what: str) -> Configuration:
    return configuration.model_copy(update={"reasons": (*configuration.reasons, f"{what} was set by hand")})


def _by(numbers: Sequence[int]) -> str:
    return "x".join(str(n) for n in numbers)
