"""Reading a checkpoint of torch.save without running what it may carry.

A pickle is a program that names functions and calls them. Here it can only name those that put tensors and plain
containers together, and gets one of ours for each; the first other name ends the reading, before anything is called.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from nnunet_lite.errors import UserError

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Storage:
    """Numbers in a file of the archive."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor whose numbers are still in the archive: most of a checkpoint is the optimizer's, which nobody needs."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unread:
    """Stands for a value that nobody needs, such as the numpy numbers in nnU-Net's log of the training."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _stored(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Stored:
    return Stored(storage, offset, shape, strides)


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _stored,
    "torch._utils._rebuild_parameter": lambda stored, *_: stored,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **dict.fromkeys(
        (
            "torch.device",
            "_codecs.encode",
            "numpy.dtype",
            "numpy.ndarray",
            *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        ),
        Unread,
    ),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get(f"{module}.{name}")
        if found is None:
            raise UserError(
                f"names {module}.{name}, which no checkpoint needs and which could run anything; it was not run",
                self.path,
                "Do not trust this file.",
            )
        return found

    def persistent_load(self, saved: Any) -> Storage:
        _, dtype, key, _, count = saved
        return Storage(str(key), dtype, int(count))


def read_checkpoint(path: Path, weights: str | None = None) -> dict[str, Any]:
    """What a checkpoint holds; of its tensors only those of the state dict called `weights` are read, if any.

    Raises
    ------
    UserError : no such file, not a checkpoint of torch.save, damaged, or it names a function to run.
    """
    try:
        with ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            with archive.open(f"{root}data.pkl") as file:
                values = _Unpickler(file, path).load()
            if weights is None:
                return dict(values)
            reader = _Reader(archive, root)
            return {**values, weights: {name: reader.tensor(stored) for name, stored in values[weights].items()}}
    except (UserError, OSError):
        raise
    except (BadZipFile, StopIteration):
        raise UserError("is no checkpoint that torch.save wrote as it has since torch 1.6", path) from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise UserError(f"is no readable checkpoint ({type(error).__name__}: {error})", path) from None


@dataclass
class _Reader:
    """Reads tensors of an archive; those that share their numbers share them here too."""

    archive: ZipFile
    root: str
    read: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, stored: Stored) -> Tensor:
        storage = stored.storage
        if storage.key not in self.read:
            entry = self.archive.getinfo(f"{self.root}data/{storage.key}")
            if entry.file_size != storage.count * storage.dtype.itemsize:
                raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
            numbers = bytearray(self.archive.read(entry))
            self.read[storage.key] = torch.frombuffer(numbers, dtype=storage.dtype)
        return self.read[storage.key].as_strided(stored.shape, stored.strides, stored.offset)
