"""Saving and restoring a run without pickle: tensors in safetensors, everything else as JSON in its header."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic

CHECKPOINT = "checkpoint.safetensors"
_ANEW = "Get it again, or train it anew with --restart."


def save_weights(path: Path, network: nn.Module, about: dict[str, Any]) -> None:
    """Write the weights alone, with `about` in the header, atomically."""
    _save(path, {k: v.detach() for k, v in network.state_dict().items()}, about)


def load_weights(path: Path, network: nn.Module) -> dict[str, Any]:
    """Read weights into a network and return what the header says.

    Raises
    ------
    UserError : no such file, not a safetensors file, weights of another network, or NaN.
    """
    tensors, about = _load(path)
    _fill(network, tensors, path)
    if bad := [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]:
        raise UserError(f"holds weights that are not finite ({bad[0]})", path, "Train it again.")
    return about


def save_checkpoint(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, their moving average, optimizer state and `state` (JSON) in one file, atomically."""
    tensors = {f"network.{k}": v.detach() for k, v in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_prefix(optimizer)}{name}.{key}"] = value if torch.is_tensor(value) else torch.tensor(value)
    tensors |= {f"average.{k}": v for k, v in (average or {}).items()}
    _save(path, tensors, state)


def load_checkpoint(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote, in place, and return its `state`.

    Another optimizer than the one that was saved starts without a past, as do weights that were frozen, and an average
    that was not saved starts from the weights.

    Raises
    ------
    UserError : as `load_weights`.
    """
    tensors, state = _load(path)
    weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    _fill(network, weights, path)
    for name, value in (average or {}).items():
        value.copy_(tensors.get(f"average.{name}", weights[name]))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in network.named_parameters() if id(p) in trained}
    for key, value in tensors.items():
        name, _, moment = key.removeprefix(_prefix(optimizer)).rpartition(".")
        if key.startswith(_prefix(optimizer)) and (parameter := named.get(name)) is not None:
            # moments in the layout of the parameter, so that the arithmetic is the same to the bit
            fused = optimizer.defaults.get("fused") and parameter.is_cuda
            step = value.to(parameter.device) if fused else value
            like = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else step
            optimizer.state[parameter][moment] = like
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint or model file, without its tensors."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads((file.metadata() or {}).get("state", "{}")))
    except FileNotFoundError:
        raise UserError("no such file", path) from None
    except Exception as error:  # safetensors raises its own SafetensorError, which is no public type
        raise UserError(f"is not a safetensors file ({error})", path, _ANEW) from None


def _fill(network: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"holds the weights of another network ({first.rstrip('.')})", path) from None


def _prefix(optimizer: torch.optim.Optimizer) -> str:
    """Of the names of its tensors: the state of one kind of optimizer means nothing to another."""
    return f"{type(optimizer).__name__.lower()}."


def _save(path: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    with atomic(path, sum(value.nbytes for value in tensors.values())) as temporary:
        mode = temporary.stat().st_mode
        # copies, because safetensors writes no memory twice, which tied weights share
        whole = {k: v.detach().to("cpu", memory_format=torch.contiguous_format, copy=True) for k, v in tensors.items()}
        save_file(whole, temporary, {"state": json.dumps(state), "checksum": _checksum(whole)})
        temporary.chmod(mode)  # safetensors writes files that only their owner may read


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    state = read_state(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get("checksum")
    if expected not in (None, _checksum(tensors)):
        raise UserError("is damaged: its checksum is another", path, _ANEW)
    return tensors, state


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), found))
    return f"{found:08x}"
