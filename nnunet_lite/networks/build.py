"""Make the network of a configuration: the planned one, or one of the user's own (`network.factory`)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from nnunet_lite.errors import UserError, describe
from nnunet_lite.networks.mednext import MedNeXt
from nnunet_lite.networks.unet import UNet, set_deep_supervision
from nnunet_lite.planning.schema import Network, Plan
from nnunet_lite.planning.topology import EXPANSION


def build_network(plan: Plan, configuration: str, factory: str | None = None, check_heads: bool = False) -> nn.Module:
    """Build the network of a configuration, in float32 on the CPU.

    Parameters
    ----------
    plan : Plan
        Plan of the dataset.
    configuration : str
        Name of the configuration, such as "3d_fullres".
    factory : str, optional
        "module:function" or "file.py:function", called with the planned `Network`, the number of input channels and the
        number of output channels. It returns a module that maps (batch, inputs, *patch) to logits (batch, outputs,
        *patch) or, if it has an attribute `deep_supervision` and that is true, to a list of logits, finest first.
    check_heads : bool
        Whether to check the output under deep supervision too.

    Returns
    -------
    nn.Module
        The network in training mode, with random weights.

    Raises
    ------
    UserError
        There is no such module or function, or its network does not return logits of the right shape.
    """
    planned = plan.configuration(configuration)
    inputs, outputs = plan.n_inputs(configuration), plan.labels.n_channels
    if factory is None:
        return (MedNeXt if planned.network.kind in EXPANSION else UNet)(planned.network, inputs, outputs)
    make = _import_function(factory)
    try:
        network = make(planned.network, inputs, outputs)
    except Exception as error:  # anything can go wrong in the user's code
        fix = "It is called with (planned network, inputs, outputs)."
        raise UserError(f"network.factory = {factory!r} fails: {describe(error)}", fix=fix) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"network.factory = {factory!r} returned {type(network).__name__}, not a torch.nn.Module")
    shape = (1, inputs, *planned.patch_size)
    _check_output(factory, network, shape, outputs, deep=False)
    if check_heads and hasattr(network, "deep_supervision"):
        _check_output(factory, network, shape, outputs, deep=True)
    return network.train()


def _import_function(factory: str) -> Callable[[Network, int, int], nn.Module]:
    """Return the function of "module:function" or "file.py:function"."""
    source, _, name = factory.rpartition(":")
    try:
        function = getattr(_import_module(source), name)
    except Exception as error:  # anything can go wrong in the user's code
        fix = 'Give "file.py:function", or "module:function" of a module that can be imported.'
        raise UserError(f"network.factory = {factory!r}: {describe(error)}", fix=fix) from error
    if not callable(function):
        raise UserError(f"network.factory = {factory!r}: {name} is not a function")
    return function


def _import_module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    local = Path(source).name  # users copy this file together with a model
    file = next((file for file in (source, local) if Path(file).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"there is no file {source}, nor {local} in this folder")
    loader = SourceFileLoader(f"nnlite_factory_{Path(file).stem}", file)
    module = sys.modules[loader.name] = ModuleType(loader.name)  # dataclasses look their module up there
    loader.exec_module(module)
    return module


def _check_output(factory: str, network: nn.Module, shape: tuple[int, ...], outputs: int, deep: bool) -> None:
    """Run a network on zeros, with or without deep supervision.

    Raises
    ------
    UserError
        It fails, or its (finest) output is not (batch, outputs, *patch).
    """
    expected = (shape[0], outputs, *shape[2:])
    set_deep_supervision(network, deep)
    case = f"a batch of shape {shape}" + " and deep_supervision = True" * deep
    try:
        with torch.inference_mode():
            output = network.eval()(torch.zeros(shape))
    except Exception as error:  # anything can go wrong in the user's code
        raise UserError(f"network.factory = {factory!r} fails on {case}: {error}") from error
    heads = output if deep and isinstance(output, list) and output else [output]
    shapes = [tuple(head.shape) if isinstance(head, Tensor) else type(head).__name__ for head in heads]
    if shapes[0] != expected:
        returned = f"a list of {', '.join(map(str, shapes))}" if heads is output else shapes[0]
        required = f"a list that begins with {expected}" if deep else expected
        raise UserError(f"network.factory = {factory!r} returns {returned} for {case}, not {required}")
