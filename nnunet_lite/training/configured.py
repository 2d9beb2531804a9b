"""The plan that is trained: the data set's, with what the settings change about it."""

from __future__ import annotations

from nnunet_lite.errors import UserError
from nnunet_lite.planning.memory import with_memory
from nnunet_lite.planning.override import limit_sizes, override_sizes
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings

_ANY_MACHINE_GB = 2000  # what is to take more is a slip of the pen, and would only fill the memory


def configured(plan: Plan, configuration: str, settings: Settings) -> Plan:
    """The plan that is trained: this configuration with the batch, patch and network of the settings.

    With the second stage of a cascade, the first one stays in the plan, as it was planned.

    Raises
    ------
    UserError : no such configuration, a cascade of more than two stages, an illegal patch, or images too small for any
        U-Net, or sizes beyond any machine.
    """
    training, stage = settings.training, plan.configuration(configuration).previous_stage
    stages = {} if stage is None else {stage: plan.configuration(stage)}
    if any(before.previous_stage is not None for before in stages.values()):
        raise UserError(f"{stage}, the previous stage of {configuration}, has one itself; a cascade has two stages")
    changed = limit_sizes(plan, configuration, training.patch_voxels, training.batch_voxels)
    changed = override_sizes(changed, configuration, training.patch_size, training.batch_size)
    planned = changed.configuration(configuration)
    wanted, network = settings.network, planned.network
    if len(network.features) == 1:
        raise UserError(f"the images are too small for the U-Net of {configuration}: not even one pooling fits")
    base, top = wanted.features_base or network.features[0], wanted.features_max or max(network.features)
    features = network.features
    if wanted.features_base or wanted.features_max:
        features = tuple(min(base * 2**i, top) for i in range(len(features)))
    network = network.model_copy(
        update={
            "features": features,
            "norm": wanted.norm or network.norm,
            "activation": wanted.activation or network.activation,
        }
    )
    planned = with_memory(planned.model_copy(update={"network": network}), len(plan.channels), plan.labels)
    if planned.memory_gb is not None and planned.memory_gb > _ANY_MACHINE_GB:
        what = f"a training step of {configuration} would take {planned.memory_gb:,.0f} GB of memory"
        raise UserError(what, fix="Lower patch_size, batch_size or features, in the plan or in the settings.")
    return changed.model_copy(update={"configurations": {configuration: planned, **stages}, "options": None})
