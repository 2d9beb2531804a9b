"""Plain NIfTI read directly: always what ITK and nibabel read, else not at all."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_lite.data import formats
from nnunet_lite.data.formats import read_file, read_file_header
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_geometry, read_image, read_label, write_label
from nnunet_lite.data.nifti import form_conflict, read_nifti, read_nifti_header
from nnunet_lite.errors import UserError

EYE = np.eye(3)


@pytest.fixture(autouse=True)
def quiet() -> None:
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def itk(path: Path) -> tuple[Geometry, int] | None:
    """What is read without the direct reader."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats.nifti, "read_nifti_header", lambda _: None)
        return read_file_header(path)


def turned(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random rotation, as matrix and as quaternion (b, c, d)."""
    a, b, c, d = q = rng.normal(size=4)
    a, b, c, d = q / np.linalg.norm(q) * np.sign(a)
    skew = np.array([[0, -d, c], [d, 0, -b], [-c, b, 0]])
    return EYE + 2 * a * skew + 2 * skew @ skew, np.array([b, c, d])


def write(path: Path, shape: tuple[int, ...] = (3, 4, 5), **fields: Any) -> np.ndarray:
    """A NIfTI-1 file of random voxels whose header holds exactly these fields; its array in the file's order."""
    order, kind = fields.get("order", "<"), np.dtype(fields.get("kind", "i2"))
    codes = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768}
    head = bytearray(352)

    def put(fmt: str, byte: int, *values: Any) -> None:
        struct.pack_into(order + fmt, head, byte, *values)

    put("i", 0, 348)
    put(f"{len(shape) + 1}h", 40, len(shape), *shape)
    put("hh", 70, codes[kind.str[1:]], 8 * kind.itemsize)
    put("8f", 76, *fields.get("pixdim", (1, 0.7, 0.8, 2.5, 1, 0, 0, 0)))
    put("3f", 108, 352, fields.get("slope", 1), fields.get("inter", 0))
    put("B", 123, fields.get("units", 10))
    put("hh", 252, fields.get("qform", 0), fields.get("sform", 0))
    put("6f", 256, *fields.get("quaternion", (0, 0, 0)), *fields.get("offset", (0, 0, 0)))
    put("12f", 280, *np.ravel(fields.get("srow", np.zeros((3, 4)))))
    put("4s", 344, fields.get("magic", b"n+1\0"))
    voxels = np.random.default_rng(0).integers(0, 100, shape).astype(kind.newbyteorder(order))
    data = bytes(head) + voxels.tobytes("F")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return voxels


def test_geometry_is_that_of_itk_to_the_last_bit(tmp_path: Path) -> None:
    rng, path, counts = np.random.default_rng(0), tmp_path / "a.nii", {"read": 0, "left": 0}
    for trial in range(60):
        matrix, quaternion = turned(rng)
        pixdim = rng.uniform(0.1, 5, 3).astype(np.float32)
        offset, hand = rng.normal(size=3) * 100, rng.choice([-1, 1])
        flips = np.diag(rng.choice([-1, 1], 3))[:, rng.permutation(3)]
        moved = offset if trial % 3 else offset + 1
        srow = {
            "turned": np.c_[matrix * (1, 1, hand) * pixdim.astype(float), moved],
            "flipped": np.c_[flips * pixdim.astype(float), moved],
            "skewed": np.c_[matrix * pixdim.astype(float) + rng.normal(size=(3, 3)) * 10.0 ** -(trial % 8), moved],
            "scaled": np.c_[matrix * 2, moved],
        }
        shape = (3, 4, 5) if trial % 2 else (3, 4, 5, 2)
        common: dict[str, Any] = {"shape": shape, "pixdim": (hand, *pixdim, 1, 0, 0, 0), "offset": offset}
        for form, rows in srow.items():
            for qform, sform in ((1, 0), (0, 1), (2, 1), (1, 4), (0, 0)):
                turn = quaternion if form == "turned" else (0, 0, 1) if trial % 4 else (0, 0, 0)
                write(path, quaternion=turn, qform=qform, sform=sform, srow=rows, **common)
                found = read_nifti_header(path)
                counts["left" if found is None else "read"] += 1
                assert found is None or found == itk(path)
    assert counts["read"] > 350 and counts["left"] > 350


@pytest.mark.parametrize("turn", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_both_forms_where_they_are_equal(tmp_path: Path, turn: tuple[int, int, int]) -> None:
    path, signs = tmp_path / "a.nii.gz", {(0, 0, 0): (1, 1, 1), (1, 0, 0): (1, -1, -1), (0, 1, 0): (-1, 1, -1)}
    srow = np.c_[np.diag(signs.get(turn, (-1, -1, 1))) * np.array([0.7, 0.8, 2.5], np.float32), (7, 8, 9)]
    both: dict[str, Any] = {"quaternion": turn, "offset": (7, 8, 9), "qform": 1, "srow": srow, "sform": 2}
    write(path, **both)
    found = read_nifti_header(path)
    assert found is not None and found == itk(path)
    write(path, **both | {"offset": (7, 8, 9.001)})
    assert read_nifti_header(path) is None


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 2), (3, 4, 1), (1, 1, 1, 1)])
def test_voxels_are_those_of_nibabel(tmp_path: Path, order: str, kind: str, shape: tuple[int, ...]) -> None:
    for name in ("a.nii", "a.nii.gz"):
        path = tmp_path / name
        voxels = write(path, shape, order=order, kind=kind, qform=1)
        plain = read_nifti(path)
        assert plain is not None and plain[1] is not None and plain[0].dtype.isnative and plain[0].flags.writeable
        assert plain[0].dtype == np.dtype(kind) and plain[0].ndim == 4
        assert np.array_equal(plain[0], voxels.reshape(*shape[:3], -1).T)
        image = read_file(path)
        array, geometry = image.array, image.geometry
        assert np.array_equal(array, plain[0]) and (geometry, array.shape[0]) == itk(path)
        assert np.array_equal(np.squeeze(nibabel.load(path).dataobj), np.squeeze(array.T))


UNCOMMON: tuple[dict[str, Any], ...] = (
    {"shape": (3, 4)}, {"shape": (3, 4, 5, 1, 2)}, {"magic": b"ni1\0"}, {"units": 3}, {"qform": 0}
)  # fmt: skip


@pytest.mark.parametrize("fields", UNCOMMON, ids=str)
def test_uncommon_headers_are_left_to_others(tmp_path: Path, fields: dict[str, Any]) -> None:
    write(tmp_path / "a.nii", **{"qform": 1} | fields)
    assert read_nifti_header(tmp_path / "a.nii") is None


@pytest.mark.parametrize("fields", [{"slope": 2}, {"slope": 1, "inter": -1024}, {"slope": np.nan}])
def test_scaled_voxels_are_left_to_nibabel(tmp_path: Path, fields: dict[str, Any]) -> None:
    write(tmp_path / "a.nii", qform=1, **fields)
    assert read_nifti(tmp_path / "a.nii") is None and read_nifti_header(tmp_path / "a.nii") == itk(tmp_path / "a.nii")


def test_oblique_files_with_two_forms_have_the_geometry_of_itk(tmp_path: Path) -> None:
    matrix, quaternion = turned(np.random.default_rng(3))
    path = tmp_path / "a.nii.gz"
    srow = np.c_[matrix * (0.7, 0.8, 2.5), (7, 8, 9)]
    voxels = write(path, quaternion=quaternion, offset=(7, 8, 9), qform=1, sform=1, srow=srow)
    plain, header = read_nifti(path), itk(path)
    assert plain is not None and plain[1] is None and header is not None
    image = read_file(path)
    assert np.array_equal(image.array[0], voxels.T) and image.geometry == header[0]


@pytest.mark.parametrize("first", [400, -10])
def test_a_file_in_several_gzip_members(tmp_path: Path, first: int) -> None:
    """The size at the end of the file is that of the last member, which may be the smaller one."""
    path = tmp_path / "a.nii"
    voxels = write(path, qform=1)
    data = path.read_bytes()
    split = path.with_suffix(".nii.gz")
    split.write_bytes(gzip.compress(data[:first]) + gzip.compress(data[first:]))
    assert np.array_equal(read_file(split).array[0], voxels.T)


def test_the_array_may_be_changed(tmp_path: Path) -> None:
    for name, order in (("a.nii", "<"), ("b.nii.gz", "<"), ("c.nii.gz", ">")):
        voxels = write(tmp_path / name, qform=1, order=order)
        plain = read_nifti(tmp_path / name)
        assert plain is not None and plain[0].dtype.isnative
        plain[0][...] += 1
        assert np.array_equal(plain[0][0], voxels.T + 1)


SROW = np.c_[np.diag([-0.7, 0.8, 2.5]), (1, 2, 3)]  # RAS
FLIPPED = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)  # the same in LPS


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("size", [0.0, -0.7, np.nan, np.inf])
@pytest.mark.parametrize("slope", [1, 2])
def test_a_wrong_pixdim_gives_way_to_a_good_sform(tmp_path: Path, axis: int, size: float, slope: float) -> None:
    """ITK takes 1 mm for 0 and NaN, and turns the axis round for a negative size."""
    pixdim = [1, 0.7, 0.8, 2.5, 1, 0, 0, 0]
    pixdim[axis] = size
    path = tmp_path / "a.nii.gz"
    voxels = write(path, pixdim=pixdim, sform=1, qform=1, srow=SROW, offset=(1, 2, 3), slope=slope)
    image = read_image(path)
    assert np.array_equal(image.array[0], slope * voxels.T)
    assert image.geometry.spacing == pytest.approx((2.5, 0.8, 0.7)) and image.geometry.origin == (-1, -2, 3)
    assert image.geometry.direction == FLIPPED and read_geometry(path) == (image.geometry, 1)
    reported = form_conflict(path, image.geometry)
    assert reported == "its pixdim has no voxel sizes; those of its sform are used"
    write_label(tmp_path / "b.nii.gz", (voxels.T % 3).astype(np.uint8), image.geometry, like=path)
    label, geometry, _ = read_label(tmp_path / "b.nii.gz")
    assert np.array_equal(label, voxels.T % 3) and geometry.differences(image.geometry) == []


@pytest.mark.parametrize("size", [0.0, -0.7, np.nan])
@pytest.mark.parametrize("qform", [0, 1])
@pytest.mark.parametrize("srow", [np.zeros((3, 4)), np.c_[[[1, 0.5, 0], [0, 1, 0], [0, 0, 1]], (1, 2, 3)]])
def test_a_wrong_pixdim_alone_is_refused(tmp_path: Path, size: float, qform: int, srow: np.ndarray) -> None:
    """Without an sform, and with one that is sheared or flat."""
    path = tmp_path / "a.nii.gz"
    write(path, pixdim=(1, 0.7, size, 2.5, 1, 0, 0, 0), qform=qform, sform=int(srow.any()), srow=srow)
    for read in (read_image, read_geometry):
        with pytest.raises(UserError, match=rf"gives voxels of \(0\.7, {size:.6g}, 2\.5\) mm in pixdim"):
            read(path)


@pytest.mark.parametrize("z", [(0, 0, 0), (1, 0, 0), (0.7, 0.8, 1e-7)])
def test_axes_in_one_plane_are_refused(tmp_path: Path, z: tuple[float, ...]) -> None:
    """What is between them has no place; axes that are only sheared are read."""
    srow = np.c_[[1, 0, 0], [0, 1, 0], z, [5, 6, 7]]
    write(tmp_path / "a.nii", sform=1, srow=srow)
    for read in (read_image, read_geometry):
        with pytest.raises(UserError, match="without volume: its axes are in one plane"):
            read(tmp_path / "a.nii")
    write(tmp_path / "a.nii", sform=1, srow=srow + np.array([0, 0, 0.1, 0]) * [[0], [0], [1]])
    assert (read_image(tmp_path / "a.nii").geometry.shear > 40) is any(z)


def test_the_depth_of_a_single_slice_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    write(path, (3, 4, 1), pixdim=(1, 0.7, 0.8, 0, 1, 0, 0, 0), qform=1)
    assert read_geometry(path)[0].spacing[1:] == pytest.approx((0.8, 0.7))


def test_pixdim_of_nifti2_and_of_pairs(tmp_path: Path) -> None:
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    two = nibabel.Nifti2Image(voxels, None)
    nibabel.save(two, tmp_path / "two.nii")
    raw = bytearray((tmp_path / "two.nii").read_bytes())
    struct.pack_into("<d", raw, 104 + 16, 0.0)
    (tmp_path / "two.nii").write_bytes(raw)
    nibabel.save(nibabel.AnalyzeImage(voxels, np.eye(4)), tmp_path / "pair.img")
    raw = bytearray((tmp_path / "pair.hdr").read_bytes())
    struct.pack_into("<f", raw, 76 + 8, np.nan)
    (tmp_path / "pair.hdr").write_bytes(raw)
    for name in ("two.nii", "pair.hdr", "pair.img"):
        with pytest.raises(UserError, match="in pixdim, and no sform"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("scaled", [1, 2])
@pytest.mark.parametrize(("units", "mm"), [(1, 1e3), (2, 1.0), (3, 1e-3), (0, 1.0)])
def test_units(tmp_path: Path, units: int, mm: float, scaled: int) -> None:
    path = tmp_path / "a.nii"
    write(path, units=units, sform=1, srow=SROW, slope=scaled)
    assert read_geometry(path)[0].spacing == pytest.approx((2.5 * mm, 0.8 * mm, 0.7 * mm))
    image = nibabel.Nifti2Image(np.zeros((3, 4, 5), np.uint8), np.diag([0.7, 0.8, 2.5, 1]))
    image.header.set_xyzt_units(units)
    nibabel.save(image, tmp_path / "two.nii")
    assert read_geometry(tmp_path / "two.nii")[0].spacing == pytest.approx((2.5 * mm, 0.8 * mm, 0.7 * mm))


def test_forms_that_do_not_agree_are_reported_in_mm(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    both: dict[str, Any] = {"quaternion": (0, 0, 0), "qform": 1, "sform": 1}
    srow = np.c_[np.diag([0.7, 0.8, 2.5]), (30, 0, 0)]
    for fields, says in (
        (both | {"srow": srow}, "its qform places it up to 30 mm from "),
        (both | {"srow": np.c_[np.diag([0.7, 0.8, 2.5]), (0.01, 0, 0)]}, None),
        (both | {"srow": np.c_[np.diag([0.7, 0.8, 2.5]), (0, 0, 0)]}, None),
        ({"sform": 1, "srow": np.c_[np.diag([1.4, 0.8, 2.5]), (0, 0, 0)]},
         "its sform places it up to 1.4 mm from where its other fields do, which are used"),
        ({"qform": 1}, None),
        ({}, None),
        (both | {"quaternion": (1, 1, 1), "srow": srow}, "its qform is not a rotation"),
    ):  # fmt: skip
        write(path, **fields)
        found = form_conflict(path, read_geometry(path)[0])
        assert found == says or (found and says and found.startswith(says)), (found, says)
    write(path, **both | {"srow": srow})
    other = "qform" if read_geometry(path)[0].origin[0] == -30 else "sform"
    assert str(form_conflict(path, read_geometry(path)[0])).startswith(f"its {other} places it up to 30 mm")


@pytest.mark.parametrize("fields", [{"qform": 1}, {"qform": 1, "sform": 1, "srow": SROW}, {"slope": 2}], ids=str)
def test_compression_and_format_do_not_depend_on_the_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    """NIfTI called .nii.gz, gzip called .nii, and endings in any case, read by each of the three readers."""
    write(tmp_path / "a.nii", **fields)
    plain = (tmp_path / "a.nii").read_bytes()
    expected = read_image(tmp_path / "a.nii")
    labels = (expected.array[0] % 3).astype(np.uint8)
    for name in ("b.nii.gz", "c.nii", "d.Nii.gz", "e.NII.GZ", "f.nii.GZ", "g.NII", "h.Nii"):
        for content in (plain, gzip.compress(plain)):
            path, out = tmp_path / name, tmp_path / f"out{name[1:]}"
            path.write_bytes(content)
            image = read_image(path)
            assert np.array_equal(image.array, expected.array) and image.geometry == expected.geometry, name
            assert read_geometry(path) == (expected.geometry, 1)
            for like in (None, path):
                write_label(out, labels, image.geometry, like)
                back, geometry, _ = read_label(out)
                assert np.array_equal(back, labels) and geometry.differences(image.geometry) == []
            out.unlink()
            path.unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["a.nii"], "no temporary file is left"
