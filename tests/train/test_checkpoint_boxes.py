"""Geometry of parts, against brute force on small tensors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.checkpoint.boxes import Box, flat_boxes, tiling_error

SHAPES = [(), (7,), (3, 4), (1, 5), (4, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3)]


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flat_ranges_decompose_into_few_contiguous_boxes(shape):
    tensor = numbered(shape)
    for start, stop in itertools.combinations(range(tensor.numel() + 1), 2):
        boxes = flat_boxes(shape, start, stop)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        covered = [tensor[box.slices].flatten() for box, _ in boxes]
        assert torch.cat(covered).tolist() == list(range(start, stop))
        assert [first for _, first in boxes] == [c[0].item() for c in covered]


def test_an_empty_flat_range_has_no_boxes():
    assert flat_boxes((3, 4), 5, 5) == []
    assert flat_boxes((0, 4), 0, 0) == []


boxes_3d = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(1, 3)) for _ in range(3)]).map(
    lambda spans: Box(tuple(a for a, _ in spans), tuple(n for _, n in spans))
)


@given(boxes_3d, boxes_3d)
def test_difference_and_intersection_partition_a_box(a, b):
    count = torch.zeros(6, 6, 6, dtype=torch.int64)
    for box in a.minus(b):
        count[box.slices] += 1
    common = a.intersect(b)
    if common is not None:
        count[common.slices] += 1
    expected = torch.zeros_like(count)
    expected[a.slices] = 1
    assert torch.equal(count, expected)


@settings(max_examples=300)
@given(st.lists(boxes_3d, max_size=4), st.data())
def test_tiling_agrees_with_counting(extra, data):
    """From a true tiling (recursive cuts), perhaps with boxes dropped or added."""
    boxes = [Box((0, 0, 0), (4, 4, 4))]
    for _ in range(data.draw(st.integers(0, 6))):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        d = data.draw(st.integers(0, 2))
        if box.shape[d] == 1:
            boxes.append(box)
            continue
        cut = data.draw(st.integers(1, box.shape[d] - 1))
        for a, n in ((0, cut), (cut, box.shape[d] - cut)):
            offset, shape = list(box.offset), list(box.shape)
            offset[d], shape[d] = offset[d] + a, n
            boxes.append(Box(tuple(offset), tuple(shape)))
    if data.draw(st.booleans()):
        boxes = boxes[data.draw(st.integers(0, len(boxes))) :] + extra
    boxes = data.draw(st.permutations(boxes))
    inside = all(e <= 4 for box in boxes for e in box.end)
    count = torch.zeros(8, 8, 8, dtype=torch.int64)
    for box in boxes:
        count[box.slices] += 1
    exact = inside and bool((count[:4, :4, :4] == 1).all())
    assert (tiling_error((4, 4, 4), boxes) is None) == exact


@pytest.mark.parametrize(
    "boxes, words",
    [
        ([Box((0, 0), (2, 4))], "lacks 4 of its 12 elements"),
        ([Box((0, 0), (3, 4)), Box((1, 1), (1, 1))], "1 elements stored more than once"),
        ([Box((0, 0), (2, 4)), Box((1, 0), (1, 4))], "overlap"),
        ([Box((0, 0), (3, 5))], "does not lie in its shape"),
        ([Box((0,), (12,))], "does not lie in its shape"),
    ],
)
def test_tiling_errors_say_what_is_wrong(boxes, words):
    assert words in (tiling_error((3, 4), boxes) or "")


def test_a_scalar_is_tiled_by_one_box_only():
    assert tiling_error((), [Box((), ())]) is None
    assert tiling_error((), [Box((), ()), Box((), ())]) is not None
    assert tiling_error((), []) is not None


def test_split_keeps_rows_whole_and_covers_the_box():
    box = Box((2, 3), (5, 4))
    parts = list(box.split(8))
    assert [p.shape for p in parts] == [(2, 4), (2, 4), (1, 4)]
    assert tiling_error((5, 4), [p.within(box) for p in parts]) is None
    assert [p.shape for p in box.split(1)] == [(1, 4)] * 5
