"""Steps that tell how good something is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_lite.api.place import Folder

if TYPE_CHECKING:
    from nnunet_lite.evaluation.scores import Scores


def evaluate(prediction: Folder, reference: Folder, **options: Any) -> Scores:
    """Score label maps against references; see `nnunet_lite.evaluation.scores.evaluate`."""
    from nnunet_lite.evaluation.scores import evaluate as evaluate_folders

    return evaluate_folders(Path(prediction), Path(reference), **options)
