"""The numbers behind the pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tests.train.report.runs import make_run
from train.report.series import Series, final, gap, load_run, smooth
from train.report.timing import phases


def test_smooth_keeps_a_constant_and_a_slope_inside() -> None:
    assert np.allclose(smooth(np.full(9, 2.5), 5), 2.5)
    slope = np.arange(20.0)
    smoothed = smooth(slope, 5)
    assert np.allclose(smoothed[:-2], slope[:-2])  # symmetric windows, shrinking at the beginning
    assert smoothed[-1] == np.mean([17.0, 18.0, 19.0])
    assert smooth(np.array([7.0]), 5).tolist() == [7.0]


def test_gap_uses_common_finite_steps_only() -> None:
    reference = Series("a", [{"step": s, "loss/lm": 2.0} for s in (1, 2, 3, 4, 5)])
    values = {2: 2.1, 4: 1.9, 5: math.nan, 8: 1.0}
    run = Series("b", [{"step": s, "loss/lm": value} for s, value in values.items()])
    steps, percent = gap(run, reference)
    assert steps.tolist() == [2, 4]
    assert np.allclose(percent, [5.0, -5.0])


def test_final_is_the_mean_of_the_last_tenth() -> None:
    assert final(np.arange(100.0)) == np.mean(np.arange(90, 100))
    assert final(np.array([3.0, 1.0])) == 1.0


def test_load_run_reads_the_baseline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert load_run(run).baseline is None
    (run / "report").mkdir()
    (run / "report" / "facts.json").write_text('{"baseline/trigram": 1.5}')
    assert load_run(run).baseline == 1.5


def test_phases_are_medians_and_rare_work_is_spread_over_all_steps() -> None:
    entries = [{"step": s, "seconds/data": value, "seconds/optimizer": 1.0} for s, value in ((1, 9.0), (5, 0.5), (10, 0.5))]
    entries[1]["seconds/evaluation"] = 4.0
    entries[2] |= {"seconds/evaluation": 6.0, "seconds/checkpoint": 5.0}
    assert phases(Series("a", entries)) == {"data": 0.5, "optimizer": 1.0, "evaluation": 1.0, "checkpoint": 0.5}
    assert phases(Series("b", [{"step": 1, "loss/lm": 2.0}])) == {}
