"""The arithmetic prediction of training memory against what autograd keeps on the meta device."""

from collections.abc import Callable

import pytest
import torch

from nnunet_lite.networks.mednext import MedNeXt
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.memory import network_layers, training_memory
from nnunet_lite.planning.schema import Kind
from nnunet_lite.planning.topology import EXPANSION, default_network, topology_of
from nnunet_lite.settings import LossSettings
from nnunet_lite.training.loss import segmentation_loss

CASES = [
    ((1.0, 1.0, 1.0), (128, 128, 128), 2),
    ((3.0, 1.0, 1.0), (20, 320, 256), 2),
    ((1.0, 1.0), (512, 512), 12),
    ((1.0, 1.0, 1.0), (40, 56, 40), 7),
]


def kept(forward: Callable[[], object], without: list[torch.Tensor]) -> int:
    """Bytes of every tensor that autograd saves for the backward pass, each memory counted once."""
    ignored = {tensor.untyped_storage()._cdata for tensor in without}
    alive: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for key, storage in alive.items() if key not in ignored)


@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("kind", ["plain", "residual", "mednext_b"])
@pytest.mark.parametrize(("spacing", "patch", "batch"), CASES)
def test_activations_are_those_that_autograd_keeps(
    spacing: tuple[float, ...], patch: tuple[int, ...], batch: int, kind: Kind, norm: str
) -> None:
    """With 16-bit layers and float32 heads, as on a GPU."""
    shape = topology_of(spacing, patch, kind)
    spec = default_network(kind, shape).model_copy(update={"norm": norm})
    with torch.device("meta"):
        net = (MedNeXt if kind in EXPANSION else UNet)(spec, 2, 3).half()
    net.heads.float()
    net.deep_supervision = True
    x = torch.empty((batch, 2, *shape.patch), dtype=torch.float16, device="meta")
    outputs: list[torch.Tensor] = []
    counted = kept(lambda: outputs.extend(net(x)), list(net.parameters()))
    logits = sum(output.untyped_storage().nbytes() for output in outputs)
    memory = training_memory(spec, shape.patch, batch, 2, 3)
    # upsampled features of a MedNeXt are counted with the border of zeros that they get later
    tolerance = 0.05 if kind in EXPANSION else 0.01
    assert memory["activations"] + memory["heads"] == pytest.approx(counted + logits, rel=tolerance)


@pytest.mark.parametrize("kind", ["plain", "residual", "mednext_l"])
def test_weights_are_those_of_the_network(kind: Kind) -> None:
    shape = topology_of((3.0, 1.0, 1.0), (20, 320, 256), kind)
    spec = default_network(kind, shape)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in (MedNeXt if kind in EXPANSION else UNet)(spec, 4, 6).parameters())
    memory = training_memory(spec, shape.patch, 2, 4, 6)
    assert memory["gradients"] == memory["optimizer"] == 4 * parameters
    assert memory["weights"] == 6 * parameters  # float32, and autocast's copy
    twice = training_memory(spec, shape.patch, 4, 4, 6)
    assert twice["activations"] == 2 * memory["activations"] and twice["weights"] == memory["weights"]


@pytest.mark.parametrize("classes", [2, 20, 117])
def test_loss_is_what_autograd_keeps_of_it(classes: int) -> None:
    shape = topology_of((1.0, 1.0), (64, 64))
    spec = default_network("plain", shape)
    heads = [layer for layer in network_layers(spec, shape.patch, 1, classes) if layer.kind == "head"][1:]

    def loss() -> None:
        for head in heads:
            logits = torch.empty(3, classes, head.voxels, device="meta", requires_grad=True)
            target = torch.empty(3, head.voxels, dtype=torch.uint8, device="meta")
            segmentation_loss(logits, target, LossSettings(), batch_dice=False)

    assert training_memory(spec, shape.patch, 3, 1, classes)["loss"] == pytest.approx(kept(loss, []), rel=0.02)
