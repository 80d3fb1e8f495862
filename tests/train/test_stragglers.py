"""The rank that keeps the others waiting is named, and nobody is when all are alike."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.layout import Layout
from tests.runbook import told
from tests.train.recipes import recipe
from train import loop, train_step
from train.observe.base import StragglersConfig
from train.observe.metrics import read_metrics
from train.stragglers import Stragglers


def judged(own: list[list[float]], steps: int = 3) -> list[tuple[int, str]]:
    """(step, sentence) of the alerts for own times by step and rank."""
    stragglers = Stragglers(StragglersConfig(ratio=1.3, steps=steps), None)  # type: ignore[arg-type]
    alerts = [stragglers._judge(step, row.index(max(row)), row) for step, row in enumerate(own, start=1)]
    return [(alert.step, alert.text) for alert in alerts if alert is not None]


def test_one_rank_that_is_slow_for_long() -> None:
    slow, even = [1.0, 1.0, 1.5, 1.1], [1.0, 1.02, 1.0, 1.1]
    (alert,) = judged([slow, slow, slow, slow, slow])
    assert alert[0] == 3 and alert[1].startswith("rank 2 is slow: in 3 logged steps in a row") and "1.5 s a step" in alert[1]
    assert [step for step, _ in judged([slow, slow, even, slow, slow, slow])] == [6]  # in a row
    assert [step for step, _ in judged([slow] * 3 + [even] + [slow] * 3)] == [3, 7]  # again, after it was well
    assert not judged([slow, [1.5, 1.0, 1.0, 1.1]] * 4)  # not always the same
    assert not judged([even] * 9) and not judged([[0.001, 0.01]] * 9) and not judged([slow] * 9, steps=0)


def run_with_a_slow_rank(rank: int, directory: str, slow: int | None) -> None:
    step = train_step.to_microbatch

    def delayed(*arguments: Any, **named: Any) -> Any:
        if rank == slow:
            time.sleep(0.08)
        return step(*arguments, **named)

    train_step.to_microbatch = delayed
    try:
        given = recipe(
            "train.steps=8",
            "optimizer.warmup=1",
            "optimizer.decay=1",
            "precision=fp32",
            f"monitor.stragglers.steps={3 if slow is not None else 6}",  # of a busy machine one rank may be slow for a while
            f"run.dir={directory}",
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        assert loop.run(given) == 0
    finally:
        train_step.to_microbatch = step


@pytest.mark.parametrize("slow", [1, None])
def test_a_rank_that_was_really_slowed(slow: int | None, ranks: Callable[[int], Callable[..., Any]], tmp_path: Path) -> None:
    ranks(2)(run_with_a_slow_rank, str(tmp_path / "run"), slow)
    entries = read_metrics(tmp_path / "run")[2:]
    alerts = tmp_path / "run" / "incidents.jsonl"
    found = [json.loads(line) for line in alerts.read_text().splitlines()] if alerts.exists() else []
    stragglers = [entry["text"] for entry in found if entry["kind"] == "straggler"]
    if slow is None:
        assert not stragglers
    else:
        assert all(entry["ranks/slowest"] == slow for entry in entries)
        assert all(entry["ranks/own_seconds_max"] > entry["ranks/own_seconds_median"] + 0.1 for entry in entries)
        assert len(stragglers) == 1
        told("One rank is slower", f"ALERT (straggler): {stragglers[0]}")


def test_one_rank_alone_has_nobody_to_wait_for() -> None:
    layout = Layout.__new__(Layout)
    object.__setattr__(layout, "world_size", 1)
    assert Stragglers(StragglersConfig(), layout).measure(1, None) == ({}, None)  # type: ignore[arg-type]
