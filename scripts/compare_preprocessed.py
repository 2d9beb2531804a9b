#!/usr/bin/env python3
"""Compare nnU-Net's preprocessed cases with ours and print one table.

  compare_preprocessed.py NNUNET_FOLDER WORKSPACE_FOLDER CONFIGURATION [--markdown]

NNUNET_FOLDER     such as nnUNet_preprocessed/Dataset004_Hippocampus/nnUNetPlans_3d_fullres
WORKSPACE_FOLDER  of the same data set, planned and preprocessed: nnlite_workspace/Dataset004_Hippocampus
CONFIGURATION     2d, 3d_fullres ...

Ours are float16, nnU-Net's float32. A voxel agrees where ours is nnU-Net's value to within one float16 step: rounding,
plus what float32 and float64 interpolation differ by (1e-6 of the range), which may tip it over to the next number.
Exits with 1 where a shape, box, image voxel, or more than one label voxel in 100 000 differs.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import blosc2
import numpy as np

from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.store import open_case

TOLERATED_LABELS = 1e-5  # where shares tie, the last bit of nnU-Net's float64 decides


@dataclass(frozen=True)
class Row:
    """How one case compares: worst difference in its values' unit, shares of voxels that differ."""

    case: str
    shape: tuple[int, ...]
    same_shape: bool
    same_box: bool
    worst: float
    beyond: float
    labels: float

    @property
    def good(self) -> bool:
        return self.same_shape and self.same_box and self.beyond == 0 and self.labels <= TOLERATED_LABELS

    def cells(self) -> tuple[str, ...]:
        same = ("differs", "equal")
        shape = " x ".join(map(str, self.shape))
        share = (f"{self.beyond:.1e}", f"{self.labels:.1e}")
        return self.case, shape, same[self.same_shape], same[self.same_box], f"{self.worst:.1e}", *share


HEADER = ("case", "shape", "shapes", "crop box", "largest difference", "beyond one float16 step", "labels differing")


def compare(theirs: Path, ours: Path, plan: Plan, configuration: str) -> Row:
    name = theirs.name.removesuffix(".b2nd")
    case = open_case(ours, plan, configuration, name)
    image = np.asarray(blosc2.open(str(theirs), mode="r")[:], np.float32)
    label = np.asarray(blosc2.open(str(theirs.with_name(f"{name}_seg.b2nd")), mode="r")[:])[0]
    # nnU-Net keeps the crop box in a pickle. Unpickling can run code: only give folders that your own nnU-Net made.
    with theirs.with_suffix(".pkl").open("rb") as file:
        box = pickle.load(file)["bbox_used_for_cropping"]
    same_box = [tuple(map(int, span)) for span in box] == [tuple(span) for span in case.placement.box]
    if image.shape != case.image.shape:
        return Row(name, image.shape, False, same_box, np.inf, 1.0, 1.0)
    mine = np.asarray(case.image[:], np.float32)
    difference = np.abs(mine - image)
    step = np.spacing(np.maximum(np.abs(mine), np.abs(image)).astype(np.float16)).astype(np.float32)
    step = np.maximum(step, 1e-6 * np.ptp(image))
    classes = np.asarray(case.label[:], np.int16)
    wanted = plan.labels.encode(np.maximum(label, 0))
    if any(channel.use_mask for channel in plan.channels):  # nnU-Net has -1 outside the nonzero mask
        wanted = np.where(label < 0, plan.labels.outside_class, wanted)
    return Row(
        name,
        image.shape,
        True,
        same_box,
        float(difference.max()),
        float((difference > step).mean()),
        float((classes != wanted).mean()),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nnunet", type=Path)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("configuration")
    parser.add_argument("--markdown", action="store_true", help="a table for docs/")
    args = parser.parse_args()
    plan = Plan.read(args.workspace / "plans.json")
    files = sorted(path for path in args.nnunet.glob("*.b2nd") if not path.stem.endswith("_seg"))
    if not files:
        parser.error(f"{args.nnunet} holds no .b2nd files of nnU-Net")
    rows = [compare(path, args.workspace / "preprocessed", plan, args.configuration) for path in files]
    table = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADER))]
    if args.markdown:
        table.insert(1, tuple("-" * width for width in widths))
    for cells in table:
        line = (" | " if args.markdown else "  ").join(c.ljust(w) for c, w in zip(cells, widths, strict=True))
        print(f"| {line} |" if args.markdown else line.rstrip())
    good = sum(row.good for row in rows)
    print(f"{good} of {len(rows)} cases agree")
    return int(good < len(rows))


if __name__ == "__main__":
    sys.exit(main())
