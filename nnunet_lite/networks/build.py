"""The network of a configuration: the planned U-Net, or one that a recipe's `network.factory` makes."""

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
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Network, Plan

Factory = Callable[[Network, int, int], nn.Module]


def build_network(plan: Plan, configuration: str, factory: str | None = None, try_deeply: bool = False) -> nn.Module:
    """The network of a configuration, in float32 on the CPU.

    Parameters
    ----------
    factory : "module:function" or "file.py:function", called with the planned `Network`, the number of input channels
        and that of output channels. It returns a module that maps (batch, inputs, *patch) to logits (batch, outputs,
        *patch), or, where it has an attribute `deep_supervision` and that is true, to a list of logits, finest first.
    try_deeply : see whether it does the latter, too.

    Raises
    ------
    UserError : there is no such module or function, or what it makes does not return logits of the right shape.
    """
    planned = plan.configuration(configuration)
    inputs, outputs = plan.n_inputs(configuration), plan.labels.n_channels
    if factory is None:
        return UNet(planned.network, inputs, outputs)
    make = _function(factory)
    try:
        network = make(planned.network, inputs, outputs)
    except Exception as error:  # whatever is wrong inside the user's code
        fix = "It is called with (planned network, inputs, outputs)."
        raise UserError(f"network.factory = {factory!r} fails: {describe(error)}", fix=fix) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"network.factory = {factory!r} returned {type(network).__name__}, no torch.nn.Module")
    _try(factory, network, (1, inputs, *planned.patch_size), outputs, try_deeply)
    return network


def supervise_deeply(network: nn.Module, on: bool) -> None:
    """Let a network put out every decoder stage, or the finest alone; one that has no such stages is left as it is."""
    if hasattr(network, "deep_supervision"):
        setattr(network, "deep_supervision", on)  # noqa: B010 - the type checker knows modules and tensors only


def _function(factory: str) -> Factory:
    """The function of "module:function" or "file.py:function"."""
    where, _, name = factory.rpartition(":")
    try:
        found = getattr(_module(where), name)
    except Exception as error:  # whatever is wrong inside the user's code
        fix = 'Give "file.py:function", or "module:function" of a module that can be imported.'
        raise UserError(f"network.factory = {factory!r}: {describe(error)}", fix=fix) from error
    if not callable(found):
        raise UserError(f"network.factory = {factory!r}: {name} is no function")
    return found


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    beside = Path(where).name  # a model that was copied here is followed by the file
    file = next((file for file in (where, beside) if Path(file).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"there is no file {where}, nor {beside} in this folder")
    loader = SourceFileLoader(f"nnlite_factory_{Path(file).stem}", file)
    module = sys.modules[loader.name] = ModuleType(loader.name)  # dataclasses look their module up there
    loader.exec_module(module)
    return module


def _try(factory: str, network: nn.Module, shape: tuple[int, ...], outputs: int, deeply: bool) -> None:
    """Run a network on zeros, as in inference and, where that is asked for and it can, under deep supervision.

    Raises
    ------
    UserError : it fails, or its (finest) output is not (batch, outputs, *patch).
    """
    expected = (shape[0], outputs, *shape[2:])
    for deep in (False, True) if deeply and hasattr(network, "deep_supervision") else (False,):
        supervise_deeply(network, deep)
        asked = f"a batch of shape {shape}" + " and deep_supervision = True" * deep
        try:
            with torch.inference_mode():
                found = network.eval()(torch.zeros(shape))
        except Exception as error:  # whatever is wrong inside the user's code
            raise UserError(f"network.factory = {factory!r} fails on {asked}: {error}") from error
        listed = found if deep and isinstance(found, list) and found else [found]
        shapes = [tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__ for f in listed]
        if shapes[0] != expected:
            got = f"a list of {', '.join(map(str, shapes))}" if listed is found else shapes[0]
            wanted = f"a list that begins with {expected}" if deep else expected
            raise UserError(f"network.factory = {factory!r} returns {got} for {asked}, not {wanted}")
    network.train()
