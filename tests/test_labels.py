"""Values, classes and channels."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_lite.data.labels import Labels, smallest_dtype
from nnunet_lite.errors import UserError
from nnunet_lite.preprocessing.pipeline import decode_logits, output_values


@pytest.mark.parametrize("values", [(0, 1, 4), (1, 7, 8, 9), (-3, 0, 2), (0, 300), (0, 5, 70_000)])
def test_any_integers_come_back_as_they_were(values: tuple[int, ...]) -> None:
    names = {f"label {v}": v for v in values if v}
    labels = Labels(names=names)
    array = np.random.default_rng(0).choice([0, *names.values()], (4, 5, 6))
    classes = labels.encode(array)
    assert classes.dtype == np.uint8
    assert set(np.unique(classes)) == set(range(labels.n_classes)), "dense"
    back = labels.decode(classes)
    assert np.array_equal(back, array)
    assert back.dtype == smallest_dtype(min(0, *values), max(values))


@pytest.mark.parametrize(
    ("names", "scored", "values"),
    [
        ({"background": 255, "object": 0}, ("object",), (255, 0)),
        ({"Background": 0, "a": -5, "b": 3}, ("a", "b"), (0, -5, 3)),
        ({"background": 3, "a": 0, "b": 7}, ("a", "b"), (3, 0, 7)),
        ({"b": 7, "a": -1}, ("a", "b"), (0, -1, 7)),
        ({"nothing": 0, "a": 2}, ("a",), (0, 2)),
    ],
)
def test_every_value_but_the_background_is_a_scored_channel(
    names: dict[str, int | tuple[int, ...]], scored: tuple[str, ...], values: tuple[int, ...]
) -> None:
    labels = Labels(names=names)
    assert (labels.region_names, labels.values) == (scored, values)
    assert labels.encode(np.array(values)).tolist() == list(range(len(values))), "the background first"
    assert labels.n_channels == len(scored) + 1
    assert labels.region_classes == tuple((i,) for i in range(1, len(values)))


def test_zero_may_be_part_of_a_region() -> None:
    labels = Labels.from_json({"background": 3, "whole": [0, 7], "core": 0}, [7, 0])
    assert labels.region_names == ("whole", "core") and labels.region_classes == ((1, 2), (1,))


def test_the_order_counts_where_labels_are_regions() -> None:
    one, other = {"whole": [1, 2], "core": [2]}, {"core": [2], "whole": [1, 2]}
    assert Labels.from_json(one, [1, 2]) != Labels.from_json(other, [1, 2])
    assert Labels.from_json({"a": 1, "b": 2}) == Labels.from_json({"b": 2, "a": 1}), "in the order of the values"


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, np.float32])
def test_negative_values_come_back(dtype: type) -> None:
    labels = Labels.from_json({"background": 0, "a": -5, "b": 3, "ignore": -1})
    array = np.random.default_rng(0).choice([-5, -1, 0, 3], (3, 4, 5)).astype(dtype)
    back = labels.decode(labels.encode(array))
    assert back.dtype == np.int8 and np.array_equal(back, array)


def test_values_that_the_type_of_the_array_cannot_hold() -> None:
    """Files with some of the labels only: unsigned where a label is negative, eight bits where one is over 255."""
    negative = Labels(names={"background": 0, "a": -5, "b": 3})
    assert negative.encode(np.array([0, 3], np.uint8)).tolist() == [0, 2]
    large = Labels(names={"background": 300, "a": 400})
    with pytest.raises(UserError, match=r"label values 0\.\.1 are not all among \[300, 400\]"):
        large.encode(np.array([0, 1], np.uint8))
    assert large.encode(np.zeros((0, 2), np.uint8)).shape == (0, 2)


def test_unknown_values_are_refused() -> None:
    labels = Labels(names={"background": 0, "a": 1, "b": 4})
    with pytest.raises(UserError, match=r"label values \[2, 3\] are not among \[0, 1, 4\]"):
        labels.encode(np.array([0, 2, 3, 4]))
    with pytest.raises(UserError, match=r"label values 0\.\.7 are not all among"):
        labels.encode(np.array([0, 7]))


def test_ignore_is_stored_after_the_last_class() -> None:
    labels = Labels.from_json({"background": 0, "a": 1, "ignore": 5})
    assert (labels.n_classes, labels.ignore, labels.ignore_class) == (2, 5, 2)
    assert labels.encode(np.array([0, 1, 5])).tolist() == [0, 1, 2]
    assert labels.to_json() == {"background": 0, "a": 1, "ignore": 5}


@pytest.mark.parametrize("value", [3, "3", 3.0, [3], ["3"]])
def test_ignore_is_written_as_any_other_value(value: object) -> None:
    assert Labels.from_json({"background": "0", "a": "1", "ignore": value}) == Labels(
        names={"background": 0, "a": 1}, ignore=3
    )


def test_an_overlap_in_part_is_a_region_of_its_own() -> None:
    """As docs/howto/regions.md has it: each region is whole in the label map of a perfect network."""
    names = {"background": 0, "A": [1, 3], "B": [2, 3], "A_and_B": [3]}
    labels = Labels.from_json(names, [1, 2, 3])
    values = np.array([0, 1, 2, 3])
    logits = np.stack([np.where(np.isin(values, of), 9, -9) for of in labels.region_values]).astype(np.float32)
    written = output_values(labels)[decode_logits(logits, labels)]
    assert written.tolist() == values.tolist() and labels.segments == labels.regions


def test_regions_are_channels() -> None:
    labels = Labels.from_json({"background": 0, "whole": [1, 2, 4], "core": [2, 4], "enhancing": 4}, [1, 2, 4])
    assert labels.has_regions and labels.n_channels == 3 and labels.n_classes == 4
    assert labels.region_names == ("whole", "core", "enhancing")
    assert labels.region_classes == ((1, 2, 3), (2, 3), (3,))
    assert Labels.from_json(labels.to_json(), [1, 2, 4]) == labels


def test_msd_writes_value_to_name() -> None:
    labels = Labels.from_json({"0": "background", "1": "Anterior", "2": "Posterior"})
    assert labels.names == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert labels.region_names == ("Anterior", "Posterior")
    assert not labels.has_regions and labels.n_channels == 3


@pytest.mark.parametrize(
    "names, order, message",
    [
        ({"background": 0}, None, "no foreground label"),
        ({"background": 0, "a": 1, "b": 1}, None, "two labels share one value"),
        ({"background": 0, "a": [1, 2]}, None, "regions_class_order must give one value for each of the 1 regions"),
        ({"background": 0, "a": 1, "ignore": 1}, None, "ignore and a share the value 1"),
        ({"background": 0, "a": [1, 2], "ignore": 2}, [1], "ignore and a share the value 2"),
        ({"background": 3, "a": 1, "ignore": 3}, None, "ignore and background share the value 3"),
        ({"a": 1, "ignore": 0}, None, "ignore and the background share the value 0"),
        ({"background": 0, "a": 1, "ignore": [2, 3]}, [1, 2], r"ignore must be a single value, not \[2, 3\]"),
        ({"background": 0, "a": [0, 1]}, [1], "region a contains the background's value 0"),
        ({"background": 9, "a": [1, 9]}, [1], "region a contains the background's value 9"),
        ({"background": [0, 1], "a": 2}, None, r"background must be a single value, not \[0, 1\]"),
        ({"background": [], "a": 2}, None, r"background must be a single value, not \[\]"),
        ({"background": 0, "a": []}, [1], "region a has no value"),
        ({"background": 0, "a": 5_000_000}, None, "label values 0 and 5000000 are more than 1048576 apart"),
    ],
)
def test_what_makes_no_sense(names: dict[str, object], order: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labels.from_json(names, order)


def test_large_arrays_in_any_memory_layout() -> None:
    labels = Labels(names={"background": 0, "a": 3, "b": 7})
    array = np.random.default_rng(0).choice([0, 3, 7], (3, 700, 800)).astype(np.uint8)
    assert array.size > 1 << 20
    for view in (array, array.transpose(2, 0, 1), array[:, ::2]):
        classes = labels.encode(view)
        assert np.array_equal(labels.decode(classes), view)
        assert np.array_equal(classes, np.searchsorted([0, 3, 7], view))
