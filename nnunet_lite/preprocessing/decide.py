"""From logits to labels: the highest class, or regions in their order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_lite.data.labels import Labels, smallest_dtype
from nnunet_lite.errors import UserError

if TYPE_CHECKING:
    import torch

_VOXELS = 1 << 14  # decided at once on a CPU: their logits stay in its cache
_SPLIT = 2**13 + 1  # leaves 11 bits of a float32's 24, as many as a float16 has


def written_values(labels: Labels) -> np.ndarray:
    """The value written for each class, or for the background and each region."""
    values = (labels.background, *(labels.region_order or ())) if labels.has_regions else labels.values
    known = (*values, *labels.values)
    return np.asarray(values, smallest_dtype(min(known), max(known)))


def must_be_finite(logits: Any, fix: str) -> None:
    """Refuse logits that are NaN or infinite, which no decision can be made from.

    Their sum shows it; only where that is not finite, each value is looked at.

    Parameters
    ----------
    logits : float16 or float32, a numpy array or a torch tensor on any device, of any shape.
    fix : what to do about it.

    Raises
    ------
    UserError : one of them is.
    """
    if isinstance(logits, np.ndarray):
        with np.errstate(all="ignore"):
            if np.isfinite(logits.sum(dtype=np.float32)):
                return
        wrong = logits.size - int(np.count_nonzero(np.isfinite(logits)))
    else:
        import torch

        if math.isfinite(logits.sum(dtype=torch.float32)):
            return
        wrong = int((~logits.isfinite()).sum())
    if wrong:
        raise UserError(f"{wrong} of {math.prod(logits.shape)} values that the network computed are NaN or infinite "
                        "(non-finite logits)", fix=fix)  # fmt: skip


def decide(data: Any, labels: Labels, head: Any = None, *, rounded: bool = False) -> np.ndarray:
    """Index into `written_values` for each voxel, in the smallest type.

    Parameters
    ----------
    data : (channels, *shape) float32 logits, a numpy array or a torch tensor on any device.
    head : (logits, channels), of the same kind: the logits are `head @ data`, of which few voxels' exist at once.
    rounded : round logits to float16 first, as nnU-Net does: it decides what would else be a close race.
    """
    flat = data.reshape(len(data), -1)
    out = np.empty(flat.shape[1], smallest_dtype(0, len(data if head is None else head)))
    at_once = _VOXELS if isinstance(data, np.ndarray) else len(out)
    for start in range(0, len(out), at_once):
        piece = slice(start, start + at_once)
        logits = flat[:, piece] if head is None else head @ flat[:, piece]
        _write(_rounded(logits) if rounded else logits, labels.has_regions, out[piece])
    return out.reshape(data.shape[1:])


def _write(logits: Any, regions: bool, out: np.ndarray) -> None:
    if not isinstance(logits, np.ndarray):
        out[:] = _on_device(logits, regions).cpu().numpy()
    elif regions:
        _last_region(logits, out)
    else:
        _highest(logits, out)


def _rounded(logits: Any) -> Any:
    """To the precision of float16 (Veltkamp's splitting), a third of the time of numpy's conversion there and back."""
    scaled = logits * _SPLIT
    return scaled - (scaled - logits)


def _highest(logits: np.ndarray, out: np.ndarray) -> None:
    """The first channel of (channels, voxels) that no other exceeds; numpy's argmax takes several times as long."""
    best, better, number = logits[0].copy(), np.empty(out.shape, bool), np.empty_like(out)
    out[:] = 0
    for index, channel in enumerate(logits[1:], 1):
        np.greater(channel, best, out=better)
        np.maximum(best, channel, out=best)
        np.maximum(out, np.multiply(better, out.dtype.type(index), out=number), out=out)  # later ones are larger


def _last_region(logits: np.ndarray, out: np.ndarray) -> None:
    """One more than the last channel of (channels, voxels) above zero; zero where there is none."""
    out[:] = 0
    for index, region in enumerate(logits, 1):
        out[region > 0] = index


def _on_device(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    import torch

    if not regions:
        return logits.argmax(dim=0)
    numbers = torch.arange(1, len(logits) + 1, device=logits.device)[:, None]
    return ((logits > 0) * numbers).amax(dim=0)
