"""nnunet_lite: nnU-Net's self-configuring medical image segmentation, made lean."""

from __future__ import annotations

# `plan`, `preprocess` and `report` are rooms of the house and steps of the API. The rooms are entered first, for Python
# binds a submodule's name on its first import; the steps then take the names, and `from nnunet_lite.plan.schema import
# Plan` works as ever.
import nnunet_lite.plan
import nnunet_lite.preprocess
import nnunet_lite.report
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
from nnunet_lite.models import load

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
