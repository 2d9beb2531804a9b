"""The steps as Python functions; the commands of `nnlite` are these with options in place of arguments.

    import nnunet_lite
    nnunet_lite.plan("Task04_Hippocampus")
    nnunet_lite.train("3d_fullres", 0, recipe="cpu")
    nnunet_lite.predict("in", "out")

Every step works in a workspace (a folder, default ./nnlite_workspace) on a planned dataset: `dataset=`
names it where the workspace has several.
"""

from __future__ import annotations

from nnunet_lite.api.data import check, measure, plan, plan_from_fingerprint, preprocess
from nnunet_lite.api.place import current_paths
from nnunet_lite.api.prediction import Predictions, export_model, import_model, predict
from nnunet_lite.api.results import evaluate, report, select
from nnunet_lite.api.training import fold_names, train
from nnunet_lite.api.viewing import view
from nnunet_lite.api.workflow import Finished, run, train_on

__all__ = [
    "Finished",
    "Predictions",
    "check",
    "current_paths",
    "evaluate",
    "export_model",
    "fold_names",
    "import_model",
    "measure",
    "plan",
    "plan_from_fingerprint",
    "predict",
    "preprocess",
    "report",
    "run",
    "select",
    "train",
    "train_on",
    "view",
]
