"""Imported by the process of `samples.start_fork_server`: all that the processes that are forked from it use."""

from __future__ import annotations

import importlib
import pkgutil

import distributed  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401
import samples  # noqa: F401
import sklearn.model_selection  # noqa: F401
import torch._dynamo  # noqa: F401

import nnunet_lite

for module in pkgutil.walk_packages(nnunet_lite.__path__, "nnunet_lite."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
