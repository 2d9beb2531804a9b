"""Resample images, label maps and logits as matrix products.

Spline interpolation with edge mode and half-pixel centres is linear and separable: along one axis it is a matrix, what
scipy's zoom would make of the identity. Three products in float32 equal the float64 spline interpolation of
scikit-image's resize, which nnU-Net uses, to about 1e-6 of the range (M. Unser, "Splines: a perfect fit for signal and
image processing", 1999, for the interpolation). The matrices are banded, so each block of output reads only the input
that it needs: results are made slab by slab, and only input and output are ever held at full size.

`resample_image` and `resample_labels` are for preprocessing; `operators` and `resampled_rows` for the way back from
logits, which may be torch tensors on a GPU. Images are (channels, z, y, x), labels (z, y, x); spacings are mm in the
same order. On the CPU the work is split over `threads`, whose number changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock, Thread
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from nnunet_lite.data.geometry import Shape, bounding_box, slices, triple
from nnunet_lite.system import cpus

ANISOTROPY = 3  # spacing ratio from which slices are resampled one by one
_NEGLIGIBLE = 1e-8  # weights below it are left out: a cubic spline's reach 14 voxels far
_COLUMNS = 128  # of an operator, that are made together
_REACH = 64  # voxels from them, where a spline of any order has fallen far below that
_TIE = np.float32(1e-5)  # shares this close are a tie: far above what float32 rounds, far below what a share means
_FEW = 4  # labels whose boxes numpy finds as fast as scipy, which takes a fifth of a second to load
_SLAB, _BLOCK = 16, 32  # output slices, and output rows or columns, per product: small enough for the cache

T = TypeVar("T")
Array = Any  # numpy array or torch tensor: both know `@`


@dataclass(frozen=True)
class Block:
    """Output `start:stop` of one axis is `matrix` (stop - start, high - low) times input `low:high`.

    The matrix is None where nothing changes.
    """

    start: int
    stop: int
    low: int
    high: int
    matrix: Array


def coarse_axis(spacing: Sequence[float], new_spacing: Sequence[float], separate_z: bool | None = None) -> int | None:
    """Return the coarse axis along which slices are resampled one by one, or None.

    As in nnU-Net: where the old spacing, otherwise the new one, is more than three times coarser along one axis only;
    unless `separate_z` decides: False never, True always, along the coarsest axis of the old spacing.
    """
    if separate_z is None:
        coarse = [s for s in (spacing, new_spacing) if max(s) / min(s) > ANISOTROPY]
    else:
        coarse = [spacing] if separate_z else []
    if not coarse:
        return None
    axes = [axis for axis, s in enumerate(coarse[0]) if s == max(coarse[0])]
    return axes[0] if len(axes) == 1 else None


def resample_image(
    data: np.ndarray,
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    order: int = 3,
    order_z: int = 0,
    separate_z: bool | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Resample an image.

    Cubic interpolation overshoots at edges; the result is clipped to the range of the input, of each channel or, where
    slices are resampled one by one, of each slice.

    Parameters
    ----------
    data : ndarray, shape (channels, z, y, x)
        Intensities.
    new_shape : sequence of int
        Voxels (z, y, x) of the result.
    spacing, new_spacing : sequence of float
        mm (z, y, x), before and after.
    order, order_z : int
        Spline orders, in plane and along the coarse axis.
    separate_z : bool, optional
        Resample slices one by one; None where the spacing is anisotropic.
    threads : int, optional
        None for one per CPU that this process may use.

    Returns
    -------
    ndarray, shape (channels, *new_shape)
        float32; the input itself where it has this shape.
    """
    data = data.astype(np.float32, copy=False)
    shape, target = triple(data.shape[1:]), triple(map(int, new_shape))
    if shape == target:
        return data
    axis, clip = coarse_axis(spacing, new_spacing, separate_z), order > 1
    if axis is not None and order_z > 0:  # slices first, then between them
        flat = triple(shape[a] if a == axis else target[a] for a in range(3))
        data = resample_image(data, flat, spacing, new_spacing, order, 0, separate_z, threads)
        shape, order, axis, clip = flat, order_z, None, False
    orders = tuple(order_z if a == axis else order for a in range(3))
    out = np.empty((data.shape[0], *target), np.float32)
    parts, y, x = operators(data, shape, target, orders)
    for channel, result in zip(data, out, strict=True):
        bounds = _bounds(channel, axis, target) if clip else None

        def work(part: Block, channel: np.ndarray = channel, result: np.ndarray = result, bounds: Any = bounds) -> None:
            slices, slab = slice(part.start, part.stop), _product(channel, part, y, x)
            if bounds is None:
                result[slices] = slab
            else:
                low, high = (bound[slices] if axis == 0 else bound for bound in bounds)
                np.clip(slab, low, high, out=result[slices])

        run_in_threads(work, parts, threads)
    return out


def resample_labels(
    labels: np.ndarray,
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    order: int = 1,
    order_z: int = 0,
    separate_z: bool | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Resample a label map.

    Each label's mask is interpolated, inside its bounding box, and the label of the largest share is written: the one
    of at least one half where two meet. The nearest voxel's label wins a tie. nnU-Net does the same with
    batchgenerators 0.25.5; with older ones it left background where no share reached one half, and the higher label
    won a tie.

    Parameters
    ----------
    labels : ndarray, shape (z, y, x)
        Integers >= 0.
    new_shape, spacing, new_spacing, order, order_z, separate_z, threads
        As in `resample_image`.

    Returns
    -------
    ndarray, shape `new_shape`
        Of the same type; the input itself where it has this shape.
    """
    shape, target = triple(labels.shape), triple(map(int, new_shape))
    if shape == target:
        return labels
    axis = coarse_axis(spacing, new_spacing, separate_z)
    if axis is not None and order_z > 0:  # slices first, then between them
        flat = triple(shape[a] if a == axis else target[a] for a in range(3))
        labels = resample_labels(labels, flat, spacing, new_spacing, order, 0, separate_z, threads)
        shape, order, axis = flat, order_z, None
    orders = tuple(order_z if a == axis else order for a in range(3))
    out = np.zeros(target, labels.dtype)
    along_z, *in_plane = (operator(n, m, order) for n, m, order in zip(shape, target, orders, strict=True))
    boxes = [(value, box, _reached(box[1:], in_plane)) for value, box in label_boxes(labels)]

    z, y, x = (nearest(n, m) for n, m in zip(shape, target, strict=True))

    def work(start: int) -> None:
        slab = out[start : start + _SLAB]
        rows = along_z[start : start + _SLAB]
        closest = labels[z[start : start + _SLAB]].take(y, axis=1).take(x, axis=2)
        best = np.zeros(slab.shape, np.float32)
        background = 1 + _TIE * (closest == 0)
        for value, box, plane in boxes:
            used = np.flatnonzero(rows[:, box[0]].any(axis=0))
            if used.size and plane is not None:
                depth = slice(box[0].start + int(used[0]), box[0].start + int(used[-1]) + 1)
                mask = (labels[depth, *box[1:]] == value).astype(np.float32)
                where = (slice(None), *plane[0])
                score = _product(mask, _split(rows[:, depth], _SLAB)[0], *plane[1])
                background[where] -= score
                score[closest[where] == value] += _TIE
                better = score > best[where]
                np.copyto(slab[where], value, where=better)
                np.copyto(best[where], score, where=better)
        slab[background > best] = 0

    run_in_threads(work, range(0, target[0], _SLAB), threads)
    return out


def operators(
    like: Array, shape: Shape, target: Shape, orders: Sequence[int], size: int = _SLAB
) -> tuple[tuple[Block, ...], tuple[Block, ...], tuple[Block, ...]]:
    """Return the operators of the three axes in blocks.

    Parameters
    ----------
    like : ndarray or Tensor
        The data: the matrices are of its kind, and on its device.
    shape, target : tuple of int
        Voxels (z, y, x), before and after.
    orders : sequence of int
        Spline order of each axis.
    size : int
        Output slices per block of the first axis.

    Returns
    -------
    tuple of three tuples of Block
        For z, y and x.
    """
    rest = _BLOCK if isinstance(like, np.ndarray) else max(target)  # a GPU wants few large products
    sizes = (size, rest, rest)
    return triple(
        tuple(
            part if part.matrix is None else replace(part, matrix=operand(like, part.matrix))
            for part in blocks(n, m, order, at_once)
        )
        for n, m, order, at_once in zip(shape, target, orders, sizes, strict=True)
    )


def resampled_rows(
    data: Array, part: Block, y: Sequence[Block], x: Sequence[Block]
) -> Iterator[tuple[slice, slice, Array]]:
    """Resample one block of output slices, piece by piece.

    Parameters
    ----------
    data : ndarray or Tensor, shape (z, channels, y, x)
        The input.
    part : Block
        The operator of these output slices.
    y, x : sequence of Block
        The operators of the other axes.

    Yields
    ------
    tuple of slice, slice and array, shape (channels, slices, rows, x)
        The output slices, their rows, and their values in float32: of one slice and few rows, which fit the cache, or
        of a tensor, of all of them.
    """
    slab = _first_product(data, part)
    size = 1 if isinstance(slab, np.ndarray) else len(slab)
    for start in range(0, len(slab), size):
        for rows, piece in _rows(slab[start : start + size], y, x):
            yield slice(part.start + start, part.start + start + size), rows, piece.swapaxes(0, 1)


@lru_cache(maxsize=32)  # of a large picture each may take hundreds of megabytes
def operator(old: int, new: int, order: int) -> np.ndarray:
    """Return the matrix (new, old), float32, that resamples one axis by a spline of an order; 0 takes the nearest.

    It is what scipy's zoom makes of the identity, a few columns and the rows near them at a time: what is far from the
    diagonal is 0, and takes neither time nor memory.
    """
    matrix = np.zeros((new, old), np.float32)
    if order == 0 or old == new:
        matrix[np.arange(new), nearest(old, new)] = 1
        return matrix
    from scipy.ndimage import affine_transform  # a fifth of a second, which equal spacings do not need

    positions = _positions(old, new)
    for start in range(0, old, _COLUMNS):
        stop = min(start + _COLUMNS, old)
        low, high = max(0, start - _REACH), min(old, stop + _REACH)
        pulses = np.eye(high - low, stop - start, low - start)
        first, end = np.searchsorted(positions, (low - 0.5, high - 0.5))
        if first < end:
            shape, shift = (end - first, stop - start), (positions[first] - low, 0)
            part = affine_transform(pulses, (old / new, 1), shift, shape, order=order, mode="nearest")
            part[np.abs(part) < _NEGLIGIBLE] = 0  # the tails reach denormal numbers, which cost ten times the time
            matrix[first:end, start:stop] = part
    return matrix


@lru_cache(maxsize=128)
def nearest(old: int, new: int) -> np.ndarray:
    """Return for each of `new` voxels along an axis the nearest of `old`."""
    return np.clip(np.floor(_positions(old, new) + 0.5), 0, old - 1).astype(np.intp)


def _positions(old: int, new: int) -> np.ndarray:
    """Return where the centres of `new` voxels along an axis are among those of `old`."""
    return old / new * (np.arange(new) + 0.5) - 0.5


@lru_cache(maxsize=512)
def blocks(old: int, new: int, order: int, size: int) -> tuple[Block, ...]:
    """Return the operator of one axis in blocks of at most `size` outputs."""
    if old == new:
        return tuple(Block(i, min(i + size, new), i, min(i + size, new), None) for i in range(0, new, size))
    return _split(operator(old, new, order), size)


def _split(matrix: np.ndarray, size: int) -> tuple[Block, ...]:
    """Rows of a banded matrix in blocks, each with only the columns that it uses."""
    out = []
    for start in range(0, len(matrix), size):
        rows = matrix[start : start + size]
        used = np.flatnonzero(rows.any(axis=0))
        low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
        out.append(Block(start, start + len(rows), low, high, np.ascontiguousarray(rows[:, low:high])))
    return tuple(out)


def label_boxes(labels: np.ndarray) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Yield every value above zero in ascending order, with its bounding box."""
    top = int(labels.max(initial=0))
    if top <= _FEW:
        for value in range(1, top + 1):
            mask = labels == value
            if mask.any():
                yield value, slices(bounding_box(mask))
        return
    from scipy.ndimage import find_objects

    for value, box in enumerate(find_objects(labels), 1):
        if box is not None:
            yield value, box


def _product(data: np.ndarray, part: Block, y: Sequence[Block], x: Sequence[Block]) -> np.ndarray:
    """One block of the first product on `data` (z, y, x), and all of the other two of it."""
    slab: np.ndarray = _first_product(data, part)
    if y[0].matrix is None and x[0].matrix is None:
        return slab
    out = np.empty((len(slab), y[-1].stop, x[-1].stop), np.float32)
    for rows, piece in _rows(slab, y, x):
        out[:, rows] = piece
    return out


def _first_product(data: Array, part: Block) -> Array:
    """One block of the product on the first axis of `data`, float32."""
    slab = data[part.low : part.high]
    slab = slab.astype(np.float32, copy=False) if isinstance(slab, np.ndarray) else slab.float()
    if part.matrix is None:
        return slab
    return (part.matrix @ slab.reshape(len(slab), -1)).reshape(-1, *slab.shape[1:])


def _rows(slab: Array, y: Sequence[Block], x: Sequence[Block]) -> Iterator[tuple[slice, Array]]:
    """The products on the last two axes, one block of rows after the other."""
    for down in y:
        strip = slab[..., down.low : down.high, :]
        strip = strip if down.matrix is None else down.matrix @ strip
        if x[0].matrix is not None:
            flat = strip.reshape(-1, strip.shape[-1])  # one large product is faster than many small ones
            shape = len(flat), x[-1].stop
            out = np.empty(shape, np.float32) if isinstance(flat, np.ndarray) else flat.new_empty(shape)
            for across in x:
                out[:, across.start : across.stop] = flat[:, across.low : across.high] @ across.matrix.T
            strip = out.reshape(*strip.shape[:-1], -1)
        yield slice(down.start, down.stop), strip


def _bounds(channel: np.ndarray, axis: int | None, target: Shape) -> tuple[Any, Any]:
    """Range of (z, y, x), or of each slice along `axis`, laid out to broadcast against the output."""
    if axis is None:
        return channel.min(), channel.max()
    others = tuple(a for a in range(3) if a != axis)
    index = nearest(channel.shape[axis], target[axis])
    shape = [-1 if a == axis else 1 for a in range(3)]
    return channel.min(others)[index].reshape(shape), channel.max(others)[index].reshape(shape)


def _reached(
    box: Sequence[slice], matrices: Sequence[np.ndarray]
) -> tuple[tuple[slice, ...], tuple[tuple[Block, ...], ...]] | None:
    """The part of the output that a box of the input affects, and its operators, axis by axis; None for no part."""
    where, parts = [], []
    for span, whole in zip(box, matrices, strict=True):
        matrix = whole[:, span]
        used = np.flatnonzero(matrix.any(axis=1))
        if not used.size:  # nearest neighbour skips every row that holds this label
            return None
        where.append(slice(int(used[0]), int(used[-1]) + 1))
        parts.append(_split(matrix[where[-1]], _BLOCK))
    return tuple(where), tuple(parts)


def operand(like: Array, matrix: np.ndarray) -> Array:
    """Return a matrix of the kind of the data, on its device."""
    return matrix if isinstance(like, np.ndarray) else like.new_tensor(matrix, dtype=like.new_empty(0).float().dtype)


_blas_limits: list[Any] = []  # one for each caller that is inside now, all the same
_blas_lock = Lock()


def run_in_threads(work: Callable[[T], None], parts: Sequence[T], threads: int | None = None) -> None:
    """Call a function with each part, in a number of threads (None: one per CPU), while BLAS has one for each."""
    threads = min(threads or cpus(), len(parts))
    with one_blas_thread():  # its own would wait for each other after each of many small products
        if threads < 2:
            for part in parts:
                work(part)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, parts):
                pass


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit numpy's BLAS to one thread; the limit is the process's: callers share it, and the last one lifts it.

    With a limit for each, one caller would restore what another had set. threadpoolctl works on the thread that calls
    it, which may not be the one that leaves last, so a thread of its own sets and lifts the limit.
    """
    with _blas_lock:
        if not _blas_limits:
            _in_own_thread(lambda: _blas_limits.append(_blas().limit(limits=1)))
        else:
            _blas_limits.append(_blas_limits[0])
    try:
        yield
    finally:
        with _blas_lock:
            limit = _blas_limits.pop()
            if not _blas_limits:
                _in_own_thread(limit.restore_original_limits)


def _in_own_thread(work: Callable[[], None]) -> None:
    thread = Thread(target=work)
    thread.start()
    thread.join()


@lru_cache(maxsize=1)
def _blas() -> Any:
    """The handle on numpy's BLAS and its threads."""
    return ThreadpoolController().select(user_api="blas")
