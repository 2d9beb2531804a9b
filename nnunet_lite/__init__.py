"""nnunet_lite: nnU-Net's self-configuring medical image segmentation, made lean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# `plan` and `preprocess` are rooms of the house and steps of the API. The rooms are entered first, for Python binds a
# submodule's name on its first import; the steps then take the names, and `from nnunet_lite.plan.schema import Plan`
# works as ever.
import nnunet_lite.plan
import nnunet_lite.preprocess  # noqa: F401

__version__ = "0.1.0"

from nnunet_lite.api import check, evaluate, export_model, import_model, plan, predict, preprocess, train

if TYPE_CHECKING:
    from nnunet_lite.inference.predictor import Model

__all__ = ["check", "evaluate", "export_model", "import_model", "load", "plan", "predict", "preprocess", "train"]


def load(folder: str | Path, **options: Any) -> Model:
    """Load a model folder, ours or nnU-Net's, or a zip; `model(array, spacing)` or `model("scan.nii.gz")` segments."""
    from nnunet_lite.inference.predictor import load as load_model
    from nnunet_lite.interop.model import native, relocated
    from nnunet_lite.interop.unpack import unpacked

    with unpacked(Path(folder)) as path, native(path, options.get("folds")) as ours:
        return relocated(load_model(ours, **options), Path(folder))
