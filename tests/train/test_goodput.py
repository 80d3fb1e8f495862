"""Every second of a run is in one category, over kills, pauses and steps taken again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.recipes import SMALL
from train import goodput
from train.goodput import CATEGORIES, Ledger, read_starts, seconds_of, summary_line
from train.observe.metrics import read_metrics


class Clock:
    """Both clocks of the ledger, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now - 500.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(monkeypatch)
    next(goodput._runs_of_this_process)  # no test begins with the process
    return clock


def test_a_run_killed_and_restarted_from_an_older_checkpoint(clock: Clock, tmp_path: Path) -> None:
    first = Ledger(tmp_path / "goodput.json")
    clock.now += 7
    first.spend("other")  # before the first step: the start-up
    for step in (1, 2, 3, 4):
        clock.now += 10
        first.spend_step(step, waiting=2, ideal=1)
        clock.now += 1
        first.spend("other")
    clock.now += 5
    first.spend("evaluation")
    clock.now += 6
    first.spend("checkpoint")
    clock.now += 100  # killed at some time within it
    second = Ledger(tmp_path / "goodput.json")
    clock.now += 3
    second.spend("other")
    for step in (3, 4, 5):
        clock.now += 10
        second.spend_step(step, waiting=0, ideal=1)
    second.close()
    metrics = second.metrics()
    expected = {"useful": 42, "recomputed": 20, "data": 8, "evaluation": 5, "checkpoint": 6, "startup": 10, "other": 4, "idle": 100}
    assert {category: metrics[f"goodput/{category}_seconds"] for category in CATEGORIES} == pytest.approx(expected)
    assert sum(expected.values()) == clock.now - 1000
    assert metrics["goodput/percent"] == pytest.approx(100 * 42 / 195) and metrics["goodput/mfu"] == pytest.approx(5 / 195)
    assert [start.furthest for start in read_starts(tmp_path)] == [4, 5]
    assert summary_line(metrics) == (
        "21.5% of the time since the run began (idle 51.3%, recomputed 10.3%, startup 5.1%, data 4.1%, checkpoint 3.1%, evaluation 2.6%, "
        "other 2.1%)"
    )


@pytest.mark.parametrize("content", ["", "[]", '{"starts": [{"begin": "x"}]}', '{"starts": [1]}', "[" * 100_000])
def test_a_damaged_account_stops_no_run(content: str, tmp_path: Path) -> None:
    (tmp_path / "goodput.json").write_text(content)
    assert read_starts(tmp_path) == []


def test_a_disk_that_takes_no_account(clock: Clock, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "gone" / "goodput.json")
    clock.now += 10
    ledger.spend_step(1, 0)
    assert ledger.metrics()["goodput/percent"] == 100


def test_what_a_logged_step_tells_is_kept(clock: Clock, tmp_path: Path) -> None:
    """A kill right after it costs nothing, however little time has passed since the last write."""
    ledger = Ledger(tmp_path / "goodput.json")
    for step in (1, 2, 3):
        clock.now += 0.5
        ledger.spend_step(step, waiting=0.1)
        told = ledger.metrics()
        (kept,) = read_starts(tmp_path)
        assert (kept.furthest, kept.seconds["useful"]) == (step, told["goodput/useful_seconds"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_injected_delays_are_where_they_belong(tmp_path: Path) -> None:
    """A slow loader, checkpoints and evaluations that are held back, SIGKILL after step 14, a pause, and step 25 without a finite loss, from
    which the run goes back to the checkpoint of step 20: every injected second is in its category, and all of them are the wall clock's."""
    run_dir, injected = tmp_path / "run", tmp_path / "injected"
    line = [sys.executable, "-W", "ignore", "-m", "tests.train.delays", "-cn", "tiny", *SMALL, "precision=fp32", "train.steps=30"]
    line += [
        "checkpoint.every=10",
        "checkpoint.asynchronous=false",
        "train.eval_every=10",
        "monitor.incidents.skips=1",
        f"run.dir={run_dir}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "INJECTED": str(injected)}
    begin = time.time()
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment) as process:
        while not any(entry["step"] >= 14 for entry in _entries(run_dir)):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    killed = time.time()
    time.sleep(4)
    again = time.time()
    subprocess.run(line, stdout=subprocess.DEVNULL, env=environment, check=True, timeout=400)
    end = time.time()

    first, second = read_starts(run_dir)
    spent, rows = seconds_of([first, second]), {entry["step"]: entry for entry in read_metrics(run_dir)}
    step = max(row["step_seconds"] for row in rows.values())  # what a kill may cost
    assert sum(spent.values()) == pytest.approx(second.end - first.begin, abs=1e-3)
    assert first.begin == pytest.approx(begin, abs=1) and second.begin == pytest.approx(again, abs=1)
    assert killed - step - 0.5 < first.end <= killed
    assert second.end == pytest.approx((run_dir / "goodput.json").stat().st_mtime, abs=1) and second.end <= end
    assert 3 <= spent["idle"] < 4 + step + 1.5  # the kernel tells the start of a process within a second

    delays = [json.loads(text) for text in injected.read_text().splitlines()]
    told = {category: sum(seconds for name, seconds in delays if name == category) for category in ("data", "checkpoint", "evaluation")}
    assert len(delays) > 150 and told["checkpoint"] > 2 and told["evaluation"] > 4
    for category in ("data", "checkpoint"):
        own = 0.5 * told[category] + 1  # what the work itself took
        assert told[category] - step < spent[category] < told[category] + own, (category, told, spent)
    measured = sum(row.get("seconds/evaluation", 0.0) for row in rows.values())
    assert told["evaluation"] < measured and spent["evaluation"] == pytest.approx(measured, rel=0.05)

    def taking(steps: range) -> float:
        return sum(rows[number]["step_seconds"] - rows[number]["seconds/data"] for number in steps)

    # Steps 11 to that of the kill, and 21 to 25, were taken twice; the rows are those of the second time.
    twice = taking(range(11, first.furthest + 1)) + taking(range(21, 26))
    assert first.furthest >= 14 and spent["recomputed"] == pytest.approx(twice, rel=0.1, abs=0.2)
    once = taking(range(1, 11)) + taking(range(first.furthest + 1, 21)) + taking(range(26, 31))
    assert once < spent["useful"] and spent["useful"] == pytest.approx(once + twice, rel=0.5)  # as long as the second time, more or less
    finished = json.loads((run_dir / "finished.json").read_text())
    assert finished["goodput/useful_seconds"] == pytest.approx(spent["useful"], rel=0.01)
    incidents = [json.loads(text)["kind"] for text in (run_dir / "incidents.jsonl").read_text().splitlines()]
    assert "rewind" in incidents, incidents


def _entries(run_dir: Path) -> list[dict]:
    return read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size else []
