"""nnunet_lite: nnU-Net's self-configuring medical image segmentation, made lean."""

from __future__ import annotations

import nnunet_lite.start  # noqa: F401 - before all that takes time to import

__version__ = "0.1.0"

from nnunet_lite.api import (
    check,
    evaluate,
    export_model,
    import_model,
    plan,
    predict,
    preprocess,
    report,
    run,
    select,
    train,
    view,
)
from nnunet_lite.models.choice import load

__all__ = [
    "check",
    "evaluate",
    "export_model",
    "import_model",
    "load",
    "plan",
    "predict",
    "preprocess",
    "report",
    "run",
    "select",
    "train",
    "view",
]
