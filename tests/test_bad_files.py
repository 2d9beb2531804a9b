"""Images, label maps and dataset.json files that are broken in ways that real ones are, through `check` and `plan`."""

from __future__ import annotations

import gzip
import io
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from bad_inputs import BadData, edit, refuse_dataset
from samples import Command, Copy, Counts, move_nifti, rewrite_nifti

IMAGE, LABEL = "imagesTr/hippocampus_001.nii.gz", "labelsTr/hippocampus_001.nii.gz"


def with_bytes(change: Callable[[bytearray], object], file: str = IMAGE) -> BadData:
    """A NIfTI file with other bytes, compressed as it was."""

    def make(root: Path) -> None:
        raw = bytearray(gzip.decompress((root / file).read_bytes()))
        change(raw)
        (root / file).write_bytes(gzip.compress(bytes(raw), 1))

    return BadData(make, file)


def with_field(offset: int, kind: str, *values: float, file: str = IMAGE) -> BadData:
    """A NIfTI file with another value in its header."""
    return with_bytes(lambda raw: struct.pack_into(kind, raw, offset, *values), file)


def without_sform(offset: int, kind: str, *values: float) -> BadData:
    """A NIfTI file that is placed by its qform alone, with another value in its header."""
    bad = with_bytes(lambda raw: (struct.pack_into("<h", raw, 254, 0), struct.pack_into(kind, raw, offset, *values)))
    return BadData(bad.make, bad.file, ("in pixdim",))


def changed(change: Callable[[Path], object], file: str = IMAGE, *says: str) -> BadData:
    return BadData(lambda root: change(root / file), file, says)


def with_content(content: bytes, file: str = IMAGE, *says: str) -> BadData:
    return changed(lambda path: path.write_bytes(content), file, *says)


def voxels(array: np.ndarray, file: str, *says: str) -> BadData:
    """Other voxels on the same grid."""
    return changed(lambda path: rewrite_nifti(path, lambda _: array), file, *says)


def named(name: str, content: bytes, *says: str) -> BadData:
    """A first case that has another ending, with this content."""

    def make(root: Path) -> None:
        (root / IMAGE).unlink()
        (root / "imagesTr" / name).write_bytes(content)
        edit(root / "dataset.json", lambda table: table["training"][0].update(image=f"imagesTr/{name}"))

    return BadData(make, f"imagesTr/{name}", says)


def instead(make: Callable[[Path], object], file: str = IMAGE, *says: str) -> BadData:
    """Something else in the place of a file."""

    def replace(root: Path) -> None:
        (root / file).unlink()
        make(root / file)

    return BadData(replace, file, says)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("scan.nii", b"0" * 1000)


def flipped(at: int) -> BadData:
    """One byte of a compressed file is another."""

    def make(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0xFF
        path.write_bytes(data)

    return changed(make, IMAGE, "damaged")


def nifti2(offset: int, kind: str, *values: float, says: str) -> BadData:
    """A small file of NIfTI-2 with another value in its header."""

    def make(path: Path) -> None:
        raw = bytearray(nibabel.Nifti2Image(np.zeros((2, 2, 2), np.uint8), None).to_bytes())
        struct.pack_into(kind, raw, offset, *values)
        path.write_bytes(gzip.compress(bytes(raw)))

    return changed(make, IMAGE, says)


def scaled_labels(path: Path, dtype: type) -> None:
    """A label map that nibabel scaled into an integer type."""
    image = nibabel.load(path)
    scaled = nibabel.Nifti1Image(np.asarray(image.dataobj, np.float32) + 0.3 * (dtype is np.int16), image.affine)
    scaled.set_data_dtype(dtype)
    nibabel.save(scaled, path)


def gipl(shape: tuple[int, ...], size: int) -> bytes:
    """A GIPL file of 16-bit voxels whose header claims a shape."""
    return struct.pack(">4HH", *shape, 1, 15).ljust(252, b"\0") + struct.pack(">I", 719555000) + bytes(size)


def tiff(shape: tuple[int, ...], **how: Any) -> bytes:
    """The bytes of a TIFF file."""
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, np.arange(np.prod(shape)).reshape(shape).astype(np.uint16), photometric="minisblack", **how
    )
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


COLOURS = np.zeros((35, 51, 35), [("R", "u1"), ("G", "u1"), ("B", "u1")])
COLOURS["R"] = 1
NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: %s\nencoding: raw\nendian: little\n%s\n"
MHA = b"ObjectType = Image\nNDims = 3\nDimSize = %s\nElementType = MET_SHORT\nElementDataFile = %s\n"
NIFTI_BYTES = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).to_bytes()
TIFF_IN_CIRCLES = b"II*\0\x08\0\0\0" + b"\0\0" + b"\x08\0\0\0"

FILES = {
    # NIfTI: the header says what cannot be, or what the file does not hold
    "a header alone": with_bytes(lambda raw: raw.__delitem__(slice(352, None))),
    "half a header": with_bytes(lambda raw: raw.__delitem__(slice(200, None))),
    "one byte too few": with_bytes(lambda raw: raw.pop()),
    "10^9 voxels in a tiny file": with_field(42, "<3h", 1000, 1000, 1000),
    "3 10^13 voxels in a tiny file": with_field(42, "<3h", 32767, 32767, 32767),
    "dimensions of zero": with_field(42, "<3h", 0, 0, 0),
    "negative dimensions": with_field(42, "<3h", -35, 51, 35),
    "no dimension": with_field(40, "<h", 0),
    "nine dimensions": with_field(40, "<h", 9),
    "negative number of dimensions": with_field(40, "<h", -3),
    "no such data type": with_field(70, "<h", 12345),
    "data type of none": with_field(70, "<h", 0),
    "bits as data type": with_field(70, "<h", 1),
    "negative voxels": without_sform(80, "<3f", -1, -1, -1),
    "voxels of no depth": without_sform(88, "<f", 0),
    "voxels as wide as NaN": without_sform(80, "<f", float("nan")),
    "voxels of infinite height": without_sform(84, "<f", float("inf")),
    "an sform of zeros and no voxel size": with_bytes(
        lambda raw: (struct.pack_into("<f", raw, 80, 0), struct.pack_into("<12f", raw, 280, *[0.0] * 12))
    ),
    "a sheared sform and no voxel size": with_bytes(
        lambda raw: (struct.pack_into("<f", raw, 80, 0), struct.pack_into("<2f", raw, 280, 1, 0.5))
    ),
    "NIfTI-2 without a voxel size": nifti2(104 + 24, "<d", 0.0, says="in pixdim"),
    "voxels far beyond the end": with_field(108, "<f", 1e9),
    "voxels before the beginning": with_field(108, "<f", -1e9),
    "voxels at NaN": with_field(108, "<f", float("nan")),
    "voxels inside the header": with_field(108, "<f", 4),
    "a matrix of NaN": with_field(280, "<12f", *[float("nan")] * 12),
    "another magic": with_field(344, "4s", b"oops"),
    "complex numbers": voxels(np.zeros((35, 51, 35), np.complex64), IMAGE, "complex"),
    "slices far apart in time": voxels(np.zeros((5, 5, 5, 2, 3), np.uint8), IMAGE, "dimensions"),
    "NIfTI-2 of 10^12 voxels": nifti2(24, "<3q", 10_000, 10_000, 10_000, says="truncated"),
    # compression
    "compressed twice": changed(lambda path: path.write_bytes(gzip.compress(path.read_bytes()))),
    "a flipped byte": flipped(5000),
    "a wrong checksum": flipped(-6),
    "a wrong size": flipped(-1),
    "cut in its compressed data": changed(lambda path: path.write_bytes(path.read_bytes()[:-3]), IMAGE, "truncated"),
    "a zip called .nii.gz": instead(zipped),
    "gzip of nothing": with_content(gzip.compress(b""), IMAGE, "no .nii.gz file"),
    "gzip's first bytes": with_content(b"\x1f\x8b\x08\0"),
    "a web page": with_content(b"<!DOCTYPE html><html><body>404</body></html>\n"),
    "text of 348 bytes": with_content(b"\\x5c" * 87),
    "zeros": with_content(bytes(100_000)),
    "compressed zeros": with_content(gzip.compress(bytes(100_000))),
    "an LFS pointer": with_content(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
    # in the place of a file
    "a folder called .nii.gz": instead(lambda path: path.mkdir(), IMAGE, "is a folder"),
    "a link to itself": instead(lambda path: path.symlink_to(path.name)),
    "a link to nowhere": instead(lambda path: path.symlink_to("gone.nii.gz")),
    "two links in a circle": instead(lambda p: (p.symlink_to("b.nii.gz"), p.with_name("b.nii.gz").symlink_to(p.name))),
    "a pipe": instead(os.mkfifo, IMAGE, "is a pipe or a device, not a file"),
    # other formats
    "NRRD without voxels": named("a.nrrd", NRRD % (b"10 10 10", b"")),
    "NRRD of 10^12 voxels": named("a.nrrd", NRRD % (b"10000 10000 10000", b"") + bytes(100)),
    "NRRD of nowhere": named("a.nrrd", NRRD % (b"10 10 10", b"data file: gone.raw\n"), "gone.raw"),
    "NRRD that is text": named("a.nrrd", b"not nrrd"),
    "NRRD of 10^9 voxels": named("a.nrrd", NRRD % (b"1000 1000 1000", b"") + bytes(100), "truncated"),
    "MHA of 10^9 voxels": named("a.mha", MHA % (b"1000 1000 1000", b"LOCAL") + bytes(100), "truncated"),
    "MHA of 10^12 voxels": named("a.mha", MHA % (b"10000 10000 10000", b"LOCAL") + bytes(100)),
    "MHA of nowhere": named("a.mhd", MHA % (b"10 10 10", b"gone.raw"), "gone.raw"),
    "MHA of negative size": named("a.mha", MHA % (b"-10 10 10", b"LOCAL") + bytes(100)),
    "MGZ that is text": named("a.mgz", b"not mgz"),
    "Analyze without its voxels": named("a.hdr", struct.pack("<i", 348) + bytes(344)),
    "PAR without REC": named("a.par", b"# === DATA DESCRIPTION FILE ===\n"),
    "HEAD without BRIK": named("a+orig.HEAD", b"type = string-attribute\n"),
    "PNG of 10^9 pixels": named("a.png", png(40000, 40000)),
    "PNG that is text": named("a.png", b"not png"),
    "TIFF in circles": named("a.tif", TIFF_IN_CIRCLES),
    "TIFF of nothing": named("a.tif", b"II*\0\x08\0\0\0"),
    "TIFF whose pages are outside": named("a.tif", b"II*\0\xff\xff\xff\x7f"),
    "BMP that ends": named("a.bmp", b"BM" + struct.pack("<I", 10**6) + bytes(48)),
    "BMP of 10^9 pixels": named("a.bmp", b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 40000, 40000, 1, 24,
                                                            0, 0, 0, 0, 0, 0)),
    "JPEG that is text": named("a.jpg", b"not jpeg"),
    "JPEG that ends": named("a.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(20)),
    "no supported ending": named("a.xyz", b"scan", "supported"),
    "voxels (.img) without a header": named("a.img", bytes(1000), "needs its header"),
    "compressed voxels without a header": named("a.img.gz", gzip.compress(bytes(1000)), "needs its header"),
    "a whole NIfTI called .img": named("a.img", NIFTI_BYTES, "Rename it to a.nii."),
    "a whole NIfTI called .hdr": named("a.hdr", gzip.compress(NIFTI_BYTES), "Rename it to a.nii.gz."),
    "a JPEG called .png": named("a.png", b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(99), "no .png file"),
    "MHA that ends": named("a.mha", MHA % (b"10 10 10", b"LOCAL") + bytes(1500), "truncated"),
    "a compressed header without voxels": named("a.hdr.gz", gzip.compress(bytes(348)), "needs the file of its voxels"),
    "REC without PAR": named("a.rec", b"voxels", "give the header"),
    "BRIK without HEAD": named("a+orig.BRIK.gz", b"voxels", "give the header"),
    "raw voxels": named("a.raw", b"voxels", "give the header"),
    "a picture as GIF": named("a.gif", b"GIF89a", "supported"),
    "GIPL that ends": named("a.gipl", gipl((35, 51, 35), 100), "truncated"),
    "GIPL of 10^13 voxels": named("a.gipl", gipl((60000, 60000, 3000), 100), "truncated"),
    "GIPL that is text": named("a.gipl", b"not gipl", "truncated"),
    "compressed GIPL that ends": named("a.gipl.gz", gzip.compress(gipl((35, 51, 35), 9999))[:-20], "truncated"),
    "TIFF that is text": named("a.tif", b"not tiff"),
    "TIFF cut in a tile": named("a.tif", tiff((90, 90), tile=(32, 32))[:-500], "truncated"),
    "TIFF cut in a strip": named("a.tiff", tiff((90, 90), compression="deflate")[:-50], "truncated"),
    "TIFF of 10^10 pixels": named("a.tif", tiff((90, 90), metadata=None).replace(
        struct.pack("<HHII", 256, 4, 1, 90), struct.pack("<HHII", 256, 4, 1, 100_000)).replace(
        struct.pack("<HHII", 257, 4, 1, 90), struct.pack("<HHII", 257, 4, 1, 100_000))),
    "TIFF of time points": named("a.tif", tiff((4, 30, 30), metadata={"axes": "TYX"}), "4 time points"),
    "TIFF of five dimensions": named("a.tif", tiff((2, 3, 4, 30, 30)), "axes QQQYX"),
    "TIFF of a damaged strip": named("a.tif", tiff((90, 90), compression="lzma").replace(b"7zXZ", b"xxxx")),
    "TIFF of an unknown compression": named("a.tif", tiff((90, 90), metadata=None).replace(
        struct.pack("<HHIHH", 259, 3, 1, 1, 0), struct.pack("<HHIHH", 259, 3, 1, 4711, 0))),
    # label maps
    "a label map scaled by nibabel": changed(lambda path: scaled_labels(path, np.uint8), LABEL, "scl_slope"),
    "fractions scaled by nibabel": changed(lambda path: scaled_labels(path, np.int16), LABEL, "scl_slope"),
    "a label map of twice the spacing": changed(lambda path: move_nifti(path, scale=2), LABEL, "spacing (2, 2, 2)"),
    "a label map of 0.2 % more spacing": changed(lambda path: move_nifti(path, scale=1.002), LABEL, "spacing"),
    "a label map of NaN": voxels(np.full((35, 51, 35), np.nan, np.float32), LABEL),
    "a label map of floats": voxels(np.random.default_rng(0).random((35, 51, 35), np.float32), LABEL, "whole"),
    "a label map of large floats": voxels(np.full((35, 51, 35), 1e30, np.float32), LABEL),
    "a label map of negative values": voxels(np.full((35, 51, 35), -1, np.int16), LABEL, "-1"),
    "a label map of colours": voxels(COLOURS, LABEL, "different channels"),
    "a label map of complex numbers": voxels(np.zeros((35, 51, 35), np.complex64), LABEL, "complex"),
    "a slice for a volume": voxels(np.zeros((35, 51), np.uint8), LABEL),
    "a header alone for a label map": with_bytes(lambda raw: raw.__delitem__(slice(352, None)), LABEL),
    "a label map that is text": with_content(b"no labels", LABEL),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_file(command: Command, copy_dataset: Copy, counts: Counts, name: str) -> None:
    """One error line names the file, in less than five seconds: nothing impossible is tried."""
    counts("bad inputs refused in one line")
    root, start = copy_dataset(2), time.process_time()
    refuse_dataset(FILES[name], command, root)
    assert time.process_time() - start < 5
