"""Predict with a model that was exported as ONNX: numpy, scipy and onnxruntime, without torch.

    from nnunet_lite.inference.onnx_runner import load_onnx
    predictor = load_onnx("exported")
    label_map = predictor(array, spacing=(z, y, x))  # or predictor("scan.nii.gz")

Preprocessing, windows and resampling are those of `nnlite predict`. The logits of a whole image are in memory at once:
4 bytes for each output channel and voxel at the plan's spacing.
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
from nnunet_lite.inference.cases import as_classes, as_image, check_channels
from nnunet_lite.inference.windows import Flip, Place, gaussian_weight, mirrorings, tile
from nnunet_lite.planning.schema import Configuration, Plan
from nnunet_lite.planning.swaps import ClassSwap
from nnunet_lite.preprocessing.pipeline import Placement, preprocess_image, require_finite, restore_segmentation
from nnunet_lite.system import cpus

FORMAT = "nnlite-onnx-1"
ABOUT, PREVIOUS = "onnx.json", "previous"  # a file, and the folder of a cascade's first stage
INPUT, OUTPUT = "image", "logits"
_VOXELS = 2**18  # of the windows that are computed at once; more does not fit the caches
_IF_NOT_FINITE = (
    "Look at the values of the image. If a GPU computes in float16, use providers=['CPUExecutionProvider'], "
    "or `nnlite predict --precision fp32`."
)
_ON_CPU = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class OnnxPredictor:
    """An exported configuration with the graphs of one or more folds, ready to predict. Threads may share it.

    Parameters
    ----------
    plan : Plan
        Its plan.
    configuration_name : str
        Such as "3d_fullres".
    folds : tuple of str
        The folds whose logits are averaged.
    sessions : tuple of InferenceSession
        The graph of each fold.
    step_size : float
        Distance of two windows, as a share of the patch.
    mirror_axes : tuple of int
        Axes of the patch along which mirrored copies are averaged; () for none.
    swap : ClassSwap, optional
        Labels that change places in mirrored copies.
    of_nnunet : bool
        The classes of a first stage go by way of the image's own grid, as in nnU-Net.
    skip_empty : bool
        Windows of zeros are background, and are not computed.
    first_stage : OnnxPredictor, optional
        The first stage of a cascade.
    """

    plan: Plan
    configuration_name: str
    folds: tuple[str, ...]
    sessions: tuple[Any, ...]
    step_size: float
    mirror_axes: tuple[int, ...]
    swap: ClassSwap | None = None
    of_nnunet: bool = False
    skip_empty: bool = False
    first_stage: OnnxPredictor | None = None

    @property
    def configuration(self) -> Configuration:
        return self.plan.configuration(self.configuration_name)

    def __call__(self, image: Any, spacing: Sequence[float] | None = None) -> np.ndarray:
        """Segment an image; parameters, result and errors are those of `Predictor`."""
        with naming(image) if isinstance(image, str | PathLike) else nullcontext():
            given = as_image(image, spacing, self.plan)
            check_channels(given, self.plan)
            return self._segment(given)

    def _segment(self, image: Image, second: Placement | None = None) -> np.ndarray:
        """Return the label map of an image; of a first stage, on the grid of the second if its placement is given."""
        first, classes = self.first_stage, None
        if first is not None and self.of_nnunet:
            classes = as_classes(first._segment(image), self.plan.labels)
        array = preprocess_image(image, classes, self.plan, self.configuration)
        if first is not None and not self.of_nnunet:
            classes = as_classes(first._segment(image, array.placement), first.plan.labels)
        logits = self.logits(array.image, classes if array.classes is None else array.classes)
        place = array.placement if second is None else array.placement.on_grid(second)
        return restore_segmentation(logits, place, self.plan.labels, self.configuration.resampling)

    def logits(self, image: np.ndarray, stage_classes: np.ndarray | None = None) -> np.ndarray:
        """Predict the logits of a preprocessed image.

        Parameters
        ----------
        image : ndarray, shape (channels, z, y, x)
            The preprocessed image.
        stage_classes : ndarray, shape (z, y, x), optional
            Classes that the first stage of a cascade predicts, on the same grid.

        Returns
        -------
        ndarray, shape (logits, z, y, x)
            float32, the mean over folds and mirrored copies; zeros where no window was computed.

        Raises
        ------
        UserError
            The graphs compute values that are NaN or infinite.
        """
        image = np.concatenate([image, *([] if stage_classes is None else [stage_classes[None]])], dtype=np.float32)
        flat = self.configuration.dimensions == 2
        patch, shape = self.configuration.patch_size, image.shape[1:]
        weight = gaussian_weight(patch)
        flips = mirrorings([axis + flat for axis in self.mirror_axes])
        class_swap = None if self.first_stage is None else self.swap
        total = np.zeros((self.plan.labels.n_channels, *shape), np.float32)
        weights = np.zeros(shape, np.float32)
        places = list(itertools.product(*tile(shape, patch, self.step_size)))
        if self.skip_empty:
            places = [place for place in places if image[:, *(span.inside for span in place)].any()]
        copies = list(itertools.product(places, flips))
        size = int(np.clip(_VOXELS // np.prod(patch), 1, 64))
        for start in range(0, len(copies), size):
            batch = copies[start : start + size]
            windows = [_cut_window(image, place, flip, class_swap) for place, flip in batch]
            for (place, flip), output in zip(batch, self._run(np.stack(windows)), strict=True):
                inside, within = (tuple(getattr(span, part) for span in place) for part in ("inside", "within"))
                share = weight[within[-weight.ndim :]] / len(flips)
                total[:, *inside] += _mirror_back(output, flip, self.swap)[:, *within] * share
                weights[inside] += share
        total /= np.where(weights > 0, weights, 1)
        require_finite(total, _IF_NOT_FINITE)
        return total

    def _run(self, windows: np.ndarray) -> np.ndarray:
        """Return the mean logits of all folds, for windows (batch, channels, *patch)."""
        if self.first_stage is not None:  # the last channel contains classes
            one_hot = [windows[:, -1:] == c for c in range(1, self.plan.labels.n_classes)]
            windows = np.concatenate([windows[:, :-1], *one_hot], axis=1, dtype=np.float32)
        flat = self.configuration.dimensions == 2
        given = {INPUT: windows[:, :, 0] if flat else windows}
        outputs: np.ndarray = np.mean([session.run([OUTPUT], given)[0] for session in self.sessions], axis=0)
        return outputs[:, :, None] if flat else outputs


def _cut_window(image: np.ndarray, place: Place, flip: Flip, swap: ClassSwap | None) -> np.ndarray:
    """Cut a window (channels, z, y, x) out of an image, with zeros outside, and mirror it.

    `swap`: of the classes in the last channel, if it has any.
    """
    window = np.pad(image[:, *(span.inside for span in place)], [(0, 0), *(span.outside for span in place)])
    window = np.flip(window, tuple(axis + 1 for axis in flip))
    if swap is not None and swap.axis in flip:
        window[-1] = np.asarray(swap.table, window.dtype)[window[-1].astype(np.intp)]
    return window


def _mirror_back(output: np.ndarray, flip: Flip, swap: ClassSwap | None) -> np.ndarray:
    """Return the logits (channels, *patch) of a flipped window as those of the window itself."""
    out = np.flip(output, tuple(axis + 1 for axis in flip))
    return out[list(swap.channels)] if swap is not None and swap.axis in flip else out


def load_onnx(
    folder: str | Path, folds: Sequence[str | int] | str | int | None = None, providers: Sequence[str] = _ON_CPU
) -> OnnxPredictor:
    """Load an exported model, and the first stage of a cascade.

    Parameters
    ----------
    folder : str or Path
        What `nnlite export --format onnx` wrote.
    folds : str, int or sequence of them, optional
        By default all that were exported.
    providers : sequence of str
        Where onnxruntime computes, in order of preference, such as ["CUDAExecutionProvider"].

    Raises
    ------
    UserError
        There is no exported model, no such fold, or a file is damaged.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise UserError(f"is no exported model (no {ABOUT})", folder, "Make one with `nnlite export --format onnx`.")
    about, plan = read_json(folder / ABOUT), Plan.read(folder / "plans.json")
    if about.get("format") != FORMAT:
        raise UserError(f"has another format than {FORMAT}", folder / ABOUT, "Export the model again.")
    folds = [folds] if isinstance(folds, str | int) else folds
    names = tuple(about["folds"] if folds is None else map(str, folds))
    if missing := [fold for fold in names if fold not in about["folds"]]:
        raise UserError(f"has no fold {', '.join(missing)}", folder, f"Its folds are: {', '.join(about['folds'])}.")
    swap = about["sides"]
    is_second = plan.configuration(about["configuration"]).previous_stage is not None
    return OnnxPredictor(
        plan=plan,
        configuration_name=about["configuration"],
        folds=names,
        sessions=tuple(start_session(folder / f"fold_{fold}.onnx", providers) for fold in names),
        step_size=about["step_size"],
        mirror_axes=tuple(about["mirror_axes"]),
        swap=swap and ClassSwap(swap["axis"], tuple(swap["classes"] or ()), tuple(swap["channels"])),
        of_nnunet=about.get("of_nnunet", True),
        skip_empty=about.get("skip_empty", False),
        first_stage=load_onnx(folder / PREVIOUS, None, providers) if is_second else None,
    )


def start_session(file: Path, providers: Sequence[str] = _ON_CPU) -> Any:
    """Load a graph into onnxruntime.

    Raises
    ------
    UserError
        onnxruntime is not installed, or cannot run the file.
    """
    try:
        import onnxruntime  # an optional extra
    except ImportError:
        raise UserError("onnxruntime is not installed", fix="pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpus()  # by default it binds a thread to every core of the machine
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:  # onnxruntime has an exception of its own for each kind of problem
        raise UserError(f"cannot be run by onnxruntime ({' '.join(str(error).split()):.200})", file) from None
