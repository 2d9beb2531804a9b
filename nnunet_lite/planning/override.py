"""Change the patch or batch size of a planned configuration.

`override_sizes` takes sizes that a user chose and refuses illegal ones; `limit_sizes` shrinks a configuration below a
number of voxels, as the recipes for small machines do.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from nnunet_lite.errors import UserError
from nnunet_lite.planning.memory import with_memory
from nnunet_lite.planning.schema import Configuration, Network, Plan
from nnunet_lite.planning.topology import (
    Topology,
    default_features,
    default_network,
    neighbouring_patches,
    shorten_patch,
    topology_of,
)


def override_sizes(
    plan: Plan, configuration: str, patch_size: Sequence[int] | None = None, batch_size: int | None = None
) -> Plan:
    """Return the plan with another patch or batch size for one configuration.

    A new patch gets the topology of nnU-Net's rule. Stages that exist before and after keep their features and blocks.

    Parameters
    ----------
    plan : Plan
        The plan to change.
    configuration : str
        Name of the configuration.
    patch_size : sequence of int, optional
        Voxels per axis; None keeps the planned patch.
    batch_size : int, optional
        Patches per step; None keeps the planned batch.

    Returns
    -------
    Plan
        The changed plan, with its predicted memory.

    Raises
    ------
    UserError
        The plan has no such configuration, the batch is below 1, or the patch cannot be pooled. The message names the
        nearest legal patches.
    """
    changed = plan.configuration(configuration)
    if patch_size is not None and tuple(patch_size) != changed.patch_size:
        changed = _with_patch(changed, tuple(patch_size))
    if batch_size is not None and batch_size != changed.batch_size:
        if batch_size < 1:
            raise UserError(f"a batch size of {batch_size} is not possible", fix="Give 1 or more.")
        changed = _set_by_hand(changed, f"batch {batch_size}", batch_size=batch_size)
    changed = with_memory(changed, len(plan.channels), plan.labels)
    return plan.model_copy(update={"configurations": {**plan.configurations, configuration: changed}})


def limit_sizes(
    plan: Plan, configuration: str, patch_voxels: int | None = None, batch_voxels: int | None = None
) -> Plan:
    """Return the plan with a smaller patch and batch where they exceed a number of voxels.

    Parameters
    ----------
    plan : Plan
        The plan to change.
    configuration : str
        Name of the configuration.
    patch_voxels : int, optional
        Largest number of voxels of a patch. The patch is shortened by the planner's rule.
    batch_voxels : int, optional
        Largest number of voxels of a batch, which has at least two patches.

    Returns
    -------
    Plan
        The changed plan; sizes within the limits stay.
    """
    c = plan.configuration(configuration)
    patch, batch = c.patch_size, c.batch_size
    shape = topology_of(c.spacing, patch)
    while patch_voxels is not None and prod(patch) > patch_voxels:
        smaller = shorten_patch(shape, c.spacing, c.median_shape)
        if smaller is None or len(smaller.strides) == 1:
            break
        shape, patch = smaller, smaller.patch
    if batch_voxels is not None:
        batch = min(batch, max(2, batch_voxels // prod(patch)))
    return override_sizes(plan, configuration, patch, batch)


def _with_patch(configuration: Configuration, patch: tuple[int, ...]) -> Configuration:
    size = "x".join(map(str, patch))
    if len(patch) != configuration.dimensions or min(patch) < 1:
        fix = f"Give {configuration.dimensions} positive numbers of voxels."
        raise UserError(f"patch size {size} is no patch", fix=fix)
    shape = topology_of(configuration.spacing, patch)
    if shape.patch != patch:
        below, above = ("x".join(map(str, legal)) for legal in neighbouring_patches(configuration.spacing, patch))
        raise UserError(
            f"patch size {size} cannot be pooled: it must be a multiple of {'x'.join(map(str, shape.divisor))}",
            fix=f"The nearest are {below} and {above}.",
        )
    if len(shape.strides) == 1:
        raise UserError(f"patch size {size} is too small to pool", fix="Give at least 8 voxels along an axis.")
    network = _adapt_network(configuration.network, shape)
    return _set_by_hand(configuration, f"patch {size}", patch_size=patch, network=network)


def _adapt_network(network: Network, shape: Topology) -> Network:
    """Keep what the network has for the stages of both topologies, and add deeper stages by nnU-Net's rule."""
    stages, old = len(shape.strides), len(network.features)
    rule = default_network(network.kind, shape)
    features = default_features(stages, len(shape.patch), base=network.features[0])
    return network.model_copy(
        update={
            "features": (network.features + features[old:])[:stages],
            "strides": shape.strides,
            "kernels": shape.kernels,
            "blocks": (network.blocks + rule.blocks[old:])[:stages],
            "decoder_convolutions": (rule.decoder_convolutions + network.decoder_convolutions)[-(stages - 1) :],
        }
    )


def _set_by_hand(configuration: Configuration, what: str, **fields: object) -> Configuration:
    return configuration.model_copy(update={**fields, "reasons": (*configuration.reasons, f"{what} was set by hand")})
