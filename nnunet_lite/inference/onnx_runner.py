"""Predicting with a model that was exported as ONNX: numpy, scipy and onnxruntime, no torch.

    from nnunet_lite.inference.onnx_runner import load
    model = load("exported")
    segmentation = model(array, spacing=(z, y, x))  # or model("scan.nii.gz")

Cropping, normalisation, resampling and the way back are those of preprocess/, the windows those of inference/. The
logits of a whole image are held at once: 4 bytes for each output channel and voxel at the plan's spacing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.images import Image
from nnunet_lite.errors import UserError, naming
from nnunet_lite.files import read_json
from nnunet_lite.inference.prepare import as_classes, as_image, must_fit
from nnunet_lite.inference.tiles import Sides, gaussian_weight, mirrorings, padding, windows
from nnunet_lite.planning.schema import Configuration, Plan
from nnunet_lite.preprocessing.pipeline import preprocess, require_finite, restore_segmentation
from nnunet_lite.system import cpus

FORMAT = "nnlite-onnx-1"
ABOUT, PREVIOUS = "onnx.json", "previous"  # a file, and the folder of a cascade's first stage
INPUT, OUTPUT = "image", "logits"
_VOXELS = 2**18  # of the windows that are computed at once; more than the caches hold gains nothing
_IF_NOT_FINITE = (
    "Look at the values of the image. If a GPU computes it in float16, take providers=['CPUExecutionProvider'], "
    "or `nnlite predict --precision fp32`."
)
_ON_CPU = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class OnnxModel:
    """An exported configuration with the networks of one or more folds, ready to predict; threads may share it.

    `model(array, spacing)` or `model("scan.nii.gz")` returns the label map (z, y, x) with the data set's values.
    `mirror_axes` of the patch are those that predictions are averaged over, () for none.
    """

    plan: Plan
    configuration_name: str
    folds: tuple[str, ...]
    sessions: tuple[Any, ...]
    step_size: float
    mirror_axes: tuple[int, ...]
    sides: Sides | None = None
    previous: OnnxModel | None = None

    @property
    def configuration(self) -> Configuration:
        return self.plan.configuration(self.configuration_name)

    def __call__(self, image: Any, spacing: Sequence[float] | None = None) -> np.ndarray:
        """Segment an image; parameters and errors are those of `inference.predictor.Model`."""
        with naming(image) if isinstance(image, str | PathLike) else nullcontext():
            ready = as_image(image, spacing, self.plan)
            must_fit(ready, self.plan)
            return _segment(self, ready)


def load(
    folder: str | Path, folds: Sequence[str | int] | str | int | None = None, providers: Sequence[str] = _ON_CPU
) -> OnnxModel:
    """Load an exported model, and of a cascade its first stage.

    Parameters
    ----------
    folds : networks to average, one or several; default: all that were exported.
    providers : where onnxruntime computes, in order of preference, e.g. ["CUDAExecutionProvider"].

    Raises
    ------
    UserError : no exported model, not that fold, or a damaged file.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise UserError(f"is no exported model (no {ABOUT})", folder, "Make one with `nnlite export --format onnx`.")
    about, plan = read_json(folder / ABOUT), Plan.read(folder / "plans.json")
    if about.get("format") != FORMAT:
        raise UserError(f"is of another format than {FORMAT}", folder / ABOUT, "Export the model again.")
    asked = [folds] if isinstance(folds, str | int) else folds
    wanted = tuple(about["folds"] if asked is None else map(str, asked))
    if missing := [fold for fold in wanted if fold not in about["folds"]]:
        raise UserError(f"has no fold {', '.join(missing)}", folder, f"It has: {', '.join(about['folds'])}.")
    second = plan.configuration(about["configuration"]).previous_stage is not None
    return OnnxModel(
        plan=plan,
        configuration_name=about["configuration"],
        folds=wanted,
        sessions=tuple(start_session(folder / f"fold_{fold}.onnx", providers) for fold in wanted),
        step_size=about["step_size"],
        mirror_axes=tuple(about["mirror_axes"]),
        sides=_sides(about["sides"]),
        previous=load(folder / PREVIOUS, None, providers) if second else None,
    )


def _sides(value: dict[str, Any] | None) -> Sides | None:
    if value is None:
        return None
    classes = value["classes"]
    return Sides(value["axis"], tuple(value["channels"]), None if classes is None else tuple(classes))


def start_session(file: Path, providers: Sequence[str] = _ON_CPU) -> Any:
    """A graph, ready to run.

    Raises
    ------
    UserError : onnxruntime is not installed, or cannot run the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is not installed", fix="pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpus()  # unset, it binds a thread to every core of the machine
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:  # onnxruntime has an exception of its own for each thing that may be wrong
        raise UserError(f"cannot be run by onnxruntime ({' '.join(str(error).split()):.200})", file) from None


def predict_logits(model: OnnxModel, image: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
    """Logits (channels, z, y, x), float32, of a preprocessed image (channels, z, y, x); mean over folds and mirrorings.

    Parameters
    ----------
    previous : (z, y, x) classes, what the first stage of a cascade predicts on the same grid.

    Raises
    ------
    UserError : what the graphs compute is NaN or infinite.
    """
    configuration, outputs = model.configuration, model.plan.labels.n_channels
    image = np.concatenate([image, *([] if previous is None else [previous[None]])], dtype=np.float32)
    flat = configuration.dimensions == 2  # a two-dimensional network sees windows one slice thick
    patch = (1, *configuration.patch_size) if flat else configuration.patch_size
    around = padding(image.shape[1:], patch)
    image = np.pad(image, ((0, 0), *around))
    inside = tuple(slice(low, size - high) for (low, high), size in zip(around, image.shape[1:], strict=True))
    weight, flips = gaussian_weight(patch), mirrorings([axis + flat for axis in model.mirror_axes])
    places = windows(image.shape[1:], patch, model.step_size)
    total, weights = np.zeros((outputs, *image.shape[1:]), np.float32), np.zeros(image.shape[1:], np.float32)
    for place in places:
        weights[place] += weight
    todo = list(itertools.product(places, flips))
    size = int(np.clip(_VOXELS // np.prod(patch), 1, 64))
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        tiles = np.stack([_mirrored(image[:, *place], flip, model.sides) for place, flip in batch])
        for (place, flip), output in zip(batch, _run(model, tiles), strict=True):
            total[:, *place] += _unmirrored(output, flip, model.sides) * (weight / len(flips))
    total /= weights
    require_finite(total, _IF_NOT_FINITE)
    return total[:, *inside]


def _segment(model: OnnxModel, image: Image) -> np.ndarray:
    """Label map (z, y, x) of an image; of a cascade, its first stage's label map is the second one's input."""
    classes = None if model.previous is None else as_classes(_segment(model.previous, image), model.plan.labels)
    prepared = preprocess(image, classes, model.plan, model.configuration)
    logits = predict_logits(model, prepared.image, prepared.classes)
    return restore_segmentation(logits, prepared.placement, model.plan.labels, model.configuration.resampling)


def _run(model: OnnxModel, tiles: np.ndarray) -> np.ndarray:
    """Mean logits of the networks of all folds, for windows (batch, channels, *patch)."""
    if model.previous is not None:  # the last channel holds classes
        classes = range(1, model.plan.labels.n_classes)
        tiles = np.concatenate([tiles[:, :-1], *(tiles[:, -1:] == c for c in classes)], axis=1, dtype=np.float32)
    flat = model.configuration.dimensions == 2
    given = {INPUT: tiles[:, :, 0] if flat else tiles}
    outputs: np.ndarray = np.mean([session.run([OUTPUT], given)[0] for session in model.sessions], axis=0)
    return outputs[:, :, None] if flat else outputs


def _mirrored(tile: np.ndarray, flip: Sequence[int], sides: Sides | None) -> np.ndarray:
    """A window (channels, *patch) flipped along some axes."""
    out = np.flip(tile, tuple(axis + 1 for axis in flip))
    if sides is not None and sides.classes is not None and sides.axis in flip:
        last = np.asarray(sides.classes, out.dtype)[out[-1:].astype(np.intp)]
        return np.concatenate([out[:-1], last])
    return out


def _unmirrored(output: np.ndarray, flip: Sequence[int], sides: Sides | None) -> np.ndarray:
    """The logits (channels, *patch) of a flipped window as those of the window itself."""
    out = np.flip(output, tuple(axis + 1 for axis in flip))
    return out[list(sides.channels)] if sides is not None and sides.axis in flip else out
