"""From trained networks to what streaming asks of windows: their logits, or the features that logits are made of.

The last layer of a U-Net is linear in each voxel, as are the mean over windows, mirrored copies and folds, and
resampling. So it may come last: with more classes than features, features are held and resampled, and the logits of a
few thousand voxels at a time are made of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_lite.inference.tiles import Sides, mirrorings
from nnunet_lite.inference.windows import Flip
from nnunet_lite.networks.precision import DTYPES, ComputeFormat
from nnunet_lite.networks.unet import UNet
from nnunet_lite.networks.winograd import thread_pool
from nnunet_lite.planning.schema import Configuration
from nnunet_lite.training.cascade import one_hot

Function = Callable[[Tensor], Tensor]

_HELD_FEATURES = 9  # tensors as large as the first stage's features that a U-Net holds at most, in its last stage
_AT_LEAST = 2  # samples: upsampling a single small one, or a network of a user's, torch does without oneDNN on a CPU
_CPU_VOXELS = 1 << 18  # of the windows that a thread computes at once: more than its cache holds gains nothing
_SMALL, _LARGE = 1 << 27, 1 << 30  # bytes that a network takes for a window, below or from which it counts as such


@dataclass(frozen=True)
class Passes:
    """How the networks of a model see an image, and what they say of it.

    Parameters
    ----------
    forward : windows (batch, inputs, z, y, x) -> (batch, outputs, z, y, x), float32, on `device`.
    outputs : channels that it returns: the logits or, with a head, the features of all folds.
    patch : of three axes, or of two for a two-dimensional network, which sees each slice of a window alone.
    flips : the mirrored copies that are averaged.
    at_once : windows and copies that are fastest together. bytes : that a network takes for each.
    head : (logits, held), float32; None where `forward` returns logits. Held are the features, those of copies whose
        sides are swapped (with `sides`), and one that is 1 where a window was computed: the bias weighs it.
    sides : labels that change places in mirrored copies.
    half : hold logits as nnU-Net does, as float16. What it decides otherwise than float32 are close races, but for the
        same map of the same weights they must be decided alike.
    precision : of the networks' arithmetic.
    """

    forward: Function
    outputs: int
    patch: tuple[int, ...]
    flips: tuple[Flip, ...]
    device: torch.device
    at_once: int
    bytes: int
    head: np.ndarray | None = None
    sides: Sides | None = None
    half: bool = False
    precision: str = "fp32"

    @property
    def held(self) -> int:
        """Channels that are summed up over windows, the weights in the last one."""
        return self.outputs + 1 if self.head is None else self.head.shape[1]


def passes_of(
    networks: Sequence[nn.Module],
    configuration: Configuration,
    n_logits: int,
    arithmetic: ComputeFormat,
    device: torch.device,
    *,
    mirror_axes: Sequence[int] = (),
    sides: Sides | None = None,
    n_previous: int | None = None,
    whole: bool = False,
    half: bool = False,
    compiled: bool = False,
) -> Passes:
    """How the networks of a model's folds see an image; their logits are averaged.

    Parameters
    ----------
    networks : on `device`, in evaluation mode, without deep supervision.
    mirror_axes : of the patch.
    n_previous : the last input channel holds classes of a previous stage, so many, which the networks see one-hot.
    whole : hold logits in any case, as `predict_logits` needs; else features where there are fewer of them.
    half : hold logits, where they are held, as in `Passes`.
    compiled : by torch.compile, once for each network and what it returns.
    """
    patch, flat = configuration.patch_size, configuration.dimensions == 2
    flips = tuple(mirrorings([axis + flat for axis in mirror_axes]))
    unets = [network for network in networks if isinstance(network, UNet)]
    head = None if whole or len(unets) < len(networks) else _head(unets, n_logits, flips, sides)
    bodies: Sequence[nn.Module] = networks if head is None else [_body(network) for network in unets]
    called = [_compiled(network, body) for network, body in zip(networks, bodies, strict=True)] if compiled else bodies

    @torch.inference_mode()
    def forward(x: Tensor) -> Tensor:
        if n_previous is not None:
            x = torch.cat([x[:, :-1], one_hot(x[:, -1], n_previous).to(x.dtype)], 1)
        seen = arithmetic.arrange(x)
        with arithmetic.autocast(device):
            outputs = [body(seen).float() for body in called]
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs, 1) if head is not None else torch.stack(outputs).mean(0)

    item = DTYPES[arithmetic.precision].itemsize
    size = _HELD_FEATURES * configuration.network.features[0] * prod(patch) * item
    each = by_slice(forward) if flat else forward
    apart = size < _SMALL and device.type == "cpu" and not compiled
    return Passes(
        forward=side_by_side(each, torch.get_num_threads()) if apart else each,
        outputs=n_logits if head is None else sum(network.spec.features[0] for network in unets),
        patch=patch,
        flips=flips,
        device=device,
        at_once=_at_once(configuration, size, device),
        bytes=size,
        head=head,
        sides=sides,
        half=half and head is None,
        precision=arithmetic.precision,
    )


def by_slice(forward: Function) -> Function:
    """A function of (batch, channels, y, x) for (batch, channels, z, y, x), each slice alone."""

    def slices(x: Tensor) -> Tensor:
        batch, channels, depth, *plane = x.shape
        out = forward(x.transpose(1, 2).reshape(batch * depth, channels, *plane))
        return out.reshape(batch, depth, *out.shape[1:]).transpose(1, 2)

    return slices


def side_by_side(forward: Function, threads: int) -> Function:
    """A function of a batch that is computed in parts at the same time, on a CPU.

    Threads that share each layer of a small network wait for each other after each; those that have their own samples
    do not. Where other programs run too, that makes it twice as fast.
    """

    def parts(x: Tensor) -> Tensor:
        workers = min(threads, len(x) // _AT_LEAST)
        if workers < 2:
            return forward(x)
        return torch.cat(list(thread_pool(workers, threads // workers).map(forward, x.tensor_split(workers))))

    return parts


def _at_once(configuration: Configuration, size: int, device: torch.device) -> int:
    """How many windows are fastest together; a network takes `size` bytes for each.

    As many as a training step holds, on a GPU. On a CPU two at least for each thread, or for all threads if they are
    not small.
    """
    if device.type != "cpu":
        return configuration.batch_size
    few = int(np.clip(_CPU_VOXELS // prod(configuration.patch_size), _AT_LEAST, 64))
    if size < _SMALL:
        return few * torch.get_num_threads()
    return _AT_LEAST if size < _LARGE else 1


def _head(unets: Sequence[UNet], n_logits: int, flips: Sequence[Flip], sides: Sides | None) -> np.ndarray | None:
    """The last layers of all folds as one matrix, see `Passes.head`; None where logits are fewer than features.

    Where sides were swapped the features of a copy make other logits, those of the label on the other side.
    """
    swapped = 0.0 if sides is None else sum(sides.axis in flip for flip in flips) / len(flips)
    n_features = sum(network.spec.features[0] for network in unets)
    if (2 if swapped else 1) * n_features + 1 >= n_logits:
        return None
    layers = [network.heads[-1].state_dict() for network in unets]
    weight = torch.cat([layer["weight"].flatten(1) for layer in layers], 1).cpu().numpy() / len(layers)
    bias = torch.stack([layer["bias"] for layer in layers]).mean(0).cpu().numpy()[:, None]
    if swapped and sides is not None:
        order = list(sides.channels)
        weight, bias = np.hstack([weight, weight[order]]), (1 - swapped) * bias + swapped * bias[order]
    return np.ascontiguousarray(np.hstack([weight, bias]), np.float32)


def _body(network: UNet) -> UNet:
    """The same network, sharing its weights, that ends with the features of its finest decoder stage."""
    body = copy.copy(network)
    body._modules = {**network._modules, "heads": nn.ModuleList([*network.heads[:-1], nn.Identity()])}
    return body


_compiled_before: WeakKeyDictionary[nn.Module, dict[bool, Function]] = WeakKeyDictionary()
_compiling = Lock()


def _compiled(network: nn.Module, body: nn.Module) -> Function:
    """`body`, which is `network` or what `_body` makes of it, compiled: the same for each image."""
    with _compiling:
        made = _compiled_before.setdefault(network, {})
        if (whole := body is network) not in made:
            made[whole] = torch.compile(copy.copy(body) if whole else body)  # a copy, or it would never be forgotten
        return made[whole]
