"""Small labels are found by the components of label maps; test_replanning.py has the warnings."""

from pathlib import Path

import numpy as np
import SimpleITK

from nnunet_lite.data.labels import Labels
from nnunet_lite.planning.spacing import median_components


def test_components_are_measured_in_mm3_per_label_and_per_region(tmp_path: Path) -> None:
    """Parts of one region that touch are one component; parts of one label at a corner, too."""
    array = np.zeros((6, 6, 6), np.uint8)
    array[0, 0, :2], array[0, 0, 2] = 1, 2
    array[3, 3, 3] = array[4, 4, 4] = array[0, 5, 5] = 9
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((1, 2, 3))
    SimpleITK.WriteImage(image, str(tmp_path / "label.nii.gz"))
    files, names = [tmp_path / "label.nii.gz"] * 2, {"background": 0, "edge": 1, "tip": 2, "core": 3, "none": 4}
    assert median_components(files, Labels(names=names), {9: 3}) == {"edge": 12, "tip": 6, "core": 9}
    regions = Labels(names={"background": 0, "line": (1, 2), "core": (3, 4)}, region_order=(1, 3))
    assert median_components(files, regions, {9: 3}) == {"line": 18, "core": 9}
