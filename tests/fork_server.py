"""Imported by the process of `samples.start_fork_server`: all that the processes that are forked from it use."""

from __future__ import annotations

import gc
import importlib
import pkgutil

import nnunet_lite

OTHERS = ("distributed", "matplotlib.figure", "pytest", "samples", "sklearn.model_selection", "torch._dynamo")

gc.disable()  # imports make a million objects, none of which is garbage
modules = [module.name for module in pkgutil.walk_packages(nnunet_lite.__path__, "nnunet_lite.")]
for name in (*OTHERS, *modules):
    if not name.endswith("__main__"):
        importlib.import_module(name)
gc.freeze()  # a collection in a fork would copy all of them
gc.enable()
