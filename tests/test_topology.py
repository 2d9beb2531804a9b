"""Where a network pools, with which kernels, and how many values its feature maps hold."""

from math import prod

import pytest

from nnunet_lite.planning.memory import network_layers
from nnunet_lite.planning.topology import default_network, feature_map_count, neighbouring_patches, topology_of


def test_isotropic_axes_are_pooled_together_down_to_four_voxels() -> None:
    shape = topology_of((1, 1, 1), (128, 128, 128))
    assert shape.patch == (128, 128, 128)
    assert shape.strides == ((1, 1, 1), *[(2, 2, 2)] * 5)
    assert set(shape.kernels) == {(3, 3, 3)}
    assert shape.divisor == (32, 32, 32)


def test_coarse_axis_waits_and_its_kernel_stays_once_it_is_spanned() -> None:
    shape = topology_of((5.0, 1.0, 1.0), (20, 256, 256))
    assert shape.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    # 5 mm beside 1 and 2 mm is skipped, beside 4 mm it is not
    assert shape.kernels[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    assert set(shape.kernels[2:]) == {(3, 3, 3)}


def test_small_and_odd_patches() -> None:
    assert topology_of((1, 1), (102.5, 405.5)).patch == (112, 448), "padded to what can be pooled"
    assert topology_of((1, 1, 1), (36, 50, 35)).patch == (40, 56, 40)
    assert topology_of((1, 1), (4, 11)).strides == ((1, 1),), "a single axis is pooled from twelve voxels on"
    assert topology_of((1, 1), (4, 12)).strides == ((1, 1), (1, 2))
    assert topology_of((9.0, 1.0, 1.0), (2, 6, 6)).kernels == ((3, 3, 3),), "the bottleneck spans all axes"


def test_features_and_blocks_follow_depth_and_dimension() -> None:
    flat = default_network("plain", topology_of((1, 1), (1024, 1024)))
    assert flat.features == (32, 64, 128, 256, 512, 512, 512, 512, 512)
    deep = default_network("residual", topology_of((1, 1, 1), (128, 128, 128)))
    assert deep.features == (32, 64, 128, 256, 320, 320)
    assert deep.blocks == (1, 3, 4, 6, 6, 6)
    assert deep.decoder_convolutions == (1, 1, 1, 1, 1)


# The counts that nnU-Net 2.8.1's own networks give for these patches and numbers of labels.
@pytest.mark.parametrize(
    ("spacing", "patch", "labels", "plain", "residual"),
    [
        ((1, 1, 1), (64, 64, 96), 3, 84799488, 104404992),
        ((3, 1, 1), (16, 128, 96), 117, 75227136, 95170560),
        ((1, 1), (512, 320), 2, 51568640, 80793600),
        ((5, 1, 1), (4, 40, 40), 5, 1875200, 2873600),
        ((1, 1, 1), (4, 4, 4), 2, 4096, 6144),
    ],
)
def test_feature_map_count_is_nnunets(
    spacing: tuple[float, ...], patch: tuple[int, ...], labels: int, plain: int, residual: int
) -> None:
    shape = topology_of(spacing, patch)
    assert feature_map_count("plain", shape, labels) == plain
    assert feature_map_count("residual", shape, labels) == residual


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_feature_map_count_agrees_with_the_list_of_layers(kind: str) -> None:
    shape = topology_of((3.0, 0.8, 0.8), (12, 64, 48))  # no two stages of equal width
    found = network_layers(default_network(kind, shape), shape.patch, 2, 6)  # type: ignore[arg-type]
    counted = sum(layer.values for layer in found if layer.kind != "head" or layer.stage == 0)
    assert feature_map_count(kind, shape, 6) == counted  # type: ignore[arg-type]
    assert max(layer.voxels for layer in found) == prod(shape.patch)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (1.0, 0.3)])
def test_neighbours_are_legal_themselves(spacing: tuple[float, ...]) -> None:
    for size in range(5, 200, 7):
        patch = tuple(size + 3 * axis for axis in range(len(spacing)))
        below, above = neighbouring_patches(spacing, patch)
        assert topology_of(spacing, below).patch == below and topology_of(spacing, above).patch == above
        assert all(low <= n <= high for low, n, high in zip(below, patch, above, strict=True))
