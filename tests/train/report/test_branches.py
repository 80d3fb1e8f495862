"""The gap of a branch: what is said of it holds, also when neighbouring steps resemble each other."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.train.report.runs import make_run
from train.report.branches import forks
from train.report.report import write_report
from train.report.series import load_run
from train.report.trend import fit_trend


def noise(random: np.random.Generator, count: int, r: float) -> np.ndarray:
    values = np.empty(count)
    last = random.normal() / (1 - r**2) ** 0.5
    for index in range(count):
        last = values[index] = r * last + random.normal()
    return values


@pytest.mark.parametrize("r", [0.0, 0.5, 0.8])
def test_standard_errors_cover_what_they_say(r: float) -> None:
    random, x, drawn = np.random.default_rng(1), np.arange(200.0), 400
    level = trend = naive = 0
    for _ in range(drawn):
        y = 3.0 + 0.02 * x + noise(random, 200, r)
        fit = fit_trend(x, y)
        level += abs(fit.level - (3.0 + 0.02 * x.mean())) < 1.96 * fit.level_error
        trend += abs(fit.trend - 0.02) < 1.96 * fit.trend_error
        naive += abs(fit.level - (3.0 + 0.02 * x.mean())) < 1.96 * np.std(y - 0.02 * x) / 200**0.5
    assert 0.88 <= level / drawn <= 0.99 and 0.88 <= trend / drawn <= 0.99
    assert r < 0.8 or naive / drawn < 0.7  # the usual error would not have done


def test_a_line_without_noise_is_found_exactly() -> None:
    fit = fit_trend(np.arange(0.0, 100.0, 10.0), 1.0 + 0.5 * np.arange(0.0, 100.0, 10.0))
    assert (fit.trend, fit.level, fit.at_end) == pytest.approx((0.5, 23.5, 46.0)) and fit.level_error < 1e-9


def test_the_report_says_the_gap_after_the_fork(tmp_path: Path) -> None:
    parent, child = make_run(tmp_path / "x"), make_run(tmp_path / "x-bf16", factor=0.99)
    note = {"run_dir": str(parent), "checkpoint": f"{parent}/checkpoints/step-00000020", "step": 20, "wandb_id": None, "changes": {}}
    (child / "branch.json").write_text(json.dumps(note))
    fork = forks([load_run(parent), load_run(child)])[0]
    assert fork.steps.tolist() == list(range(1, 41)) and np.allclose(fork.percent, -1.0)
    said: list[str] = []
    page = write_report([parent, child], tmp_path / "report", said.append)
    assert "x-bf16, branch of x at step 20: gap -1.000 ± 0.000% over 40 logged steps, trend" in said[0]
    assert (tmp_path / "report/branches.png").exists() and said[0].split(":")[0] in page.read_text()
    (child / "branch.json").write_text("[")
    assert forks([load_run(parent), load_run(child)]) == []
