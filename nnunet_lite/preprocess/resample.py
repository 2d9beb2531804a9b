"""The import path of older scripts: `resample_image` and `resample_labels` of preprocessing/resampling.py."""

from nnunet_lite.preprocessing.resampling import resample_image, resample_labels

__all__ = ["resample_image", "resample_labels"]
