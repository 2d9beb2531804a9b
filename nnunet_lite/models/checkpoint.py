"""Saving and restoring a run without pickle: tensors in safetensors, everything else as JSON in its header."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic
from nnunet_lite.models.folder import read_weights_header


def save_weights(file: Path, network: nn.Module, header: dict[str, Any]) -> None:
    """Write the weights of a network atomically, with a header of JSON."""
    _write(file, _copy_to_cpu(network.state_dict()), json.dumps(header))


def load_weights(file: Path, network: nn.Module) -> dict[str, Any]:
    """Read weights into a network and return the header.

    Raises
    ------
    UserError
        There is no such file, it is no safetensors file, or it is damaged, or it has weights of another network or NaN.
    """
    tensors, header = read_weights(file)
    _fill(network, tensors, file)
    return header


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights, which no network is needed for, and their header.

    Raises
    ------
    UserError
        There is no such file, it is no safetensors file, it is damaged, or it has NaN.
    """
    tensors, header = _load(file)
    check_finite(tensors, file)
    return tensors, header


def check_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse weights that are infinite or NaN.

    Raises
    ------
    UserError
        Names the first tensor that has such a value.
    """
    if bad := [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]:
        raise UserError(f"holds weights that are not finite ({bad[0]})", file, "Take other weights, or train it again.")


def snapshot_checkpoint(
    file: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: dict[str, Tensor] | None = None,
) -> Callable[[], None]:
    """Copy a run as it is now, and return a function that writes it in one file, atomically.

    A thread may call the function during the next steps.

    Parameters
    ----------
    file : Path
        Where to.
    network, optimizer : Module, Optimizer
        Whose weights and moments are saved.
    state : dict
        JSON for the header.
    average : dict of str to Tensor, or None
        Moving average of the weights.
    """
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_prefix(optimizer)}{name}.{key}"] = torch.as_tensor(value)
    tensors |= {f"average.{name}": value for name, value in (average or {}).items()}
    return partial(_write, file, _copy_to_cpu(tensors), json.dumps(state))


def load_checkpoint(
    file: Path, network: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Restore in place what `snapshot_checkpoint` wrote, and return its `state`.

    An optimizer of another kind starts without moments, and so do weights that were frozen. An average that was not
    saved starts from the weights.

    Raises
    ------
    UserError
        As `load_weights`.
    """
    tensors, state = _load(file)
    weights = {name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")}
    _fill(network, weights, file)
    for name, value in (average or {}).items():
        value.copy_(tensors.get(f"average.{name}", weights[name]))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in network.named_parameters() if id(p) in trained}
    for key, value in tensors.items():
        name, _, moment = key.removeprefix(_prefix(optimizer)).rpartition(".")
        if key.startswith(_prefix(optimizer)) and (parameter := parameters.get(name)) is not None:
            if value.shape == parameter.shape:  # in the layout of the parameter, so that the arithmetic is bit-exact
                value = torch.empty_like(parameter).copy_(value)
            elif optimizer.defaults.get("fused") and parameter.is_cuda:  # its counter of steps
                value = value.to(parameter.device)
            optimizer.state[parameter][moment] = value
    return state


def _fill(network: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"holds the weights of another network ({first.rstrip('.')})", file) from None


def _prefix(optimizer: torch.optim.Optimizer) -> str:
    """How the names of its tensors start: the moments of one kind of optimizer mean nothing to another."""
    return f"{type(optimizer).__name__.lower()}."


def _copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # each a copy of its own, because safetensors refuses memory that tied weights share
    return {k: v.detach().to("cpu", memory_format=torch.contiguous_format, copy=True) for k, v in tensors.items()}


def _write(file: Path, tensors: dict[str, Tensor], state: str) -> None:
    with atomic(file, sum(value.nbytes for value in tensors.values())) as temporary:
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, {"state": state, "checksum": _checksum(tensors)})
        temporary.chmod(mode)  # safetensors writes files that only their owner may read


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = read_weights_header(file)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        expected = (opened.metadata() or {}).get("checksum")
    if expected not in (None, _checksum(tensors)):
        raise UserError("is damaged: its checksum is wrong", file, "Get it again, or train it again with --restart.")
    return tensors, state


def _checksum(tensors: dict[str, Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
