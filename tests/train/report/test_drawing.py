"""The pieces pictures are drawn with."""

from __future__ import annotations

import itertools

import pytest

from train.report.drawing import spread


@pytest.mark.parametrize("places", [[0.5], [0.0, 0.0, 0.0], [0.1, 0.5, 0.505, 0.51, 0.9], [0.97, 0.98, 1.0, 1.0], [0.3] * 6])
def test_labels_keep_their_distance_order_and_frame(places: list[float]) -> None:
    moved = spread(places, 0.06)
    assert all(after - before >= 0.06 - 1e-9 for before, after in itertools.pairwise(moved))
    assert moved[0] >= 0.0 and moved[-1] <= 1.0 + 1e-9
    if len(places) == 1:
        assert moved == places
