"""Every second of a run is in one category, over kills, pauses and steps taken again."""

import json
import os
import signal
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


@pytest.mark.slow
def test_a_real_run_killed_and_left_alone(tmp_path: Path) -> None:
    """A slow evaluator, SIGKILL after a checkpoint, a pause: all of it is accounted for, within the seconds between two writes."""
    command = [sys.executable, "-m", "tests.train.faulty", "-cn", "tiny", *SMALL, "train.steps=60", "train.eval_every=30"]
    command += ["checkpoint.every=25", "evaluation.evaluators=[faulty]", "evaluation.faulty.step=30", "evaluation.faulty.what=hang"]
    command += ["evaluation.faulty.seconds=4", f"run.dir={tmp_path / 'run'}"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.time()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=one_thread) as process:
        while not any(e["step"] >= 45 for e in _entries(tmp_path / "run")):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(6)
    subprocess.run(command, stdout=subprocess.DEVNULL, env=one_thread, check=True, timeout=200)
    end = time.time()
    spent = seconds_of(read_starts(tmp_path / "run"))
    assert sum(spent.values()) == pytest.approx(end - begin, abs=6)  # an interpreter takes a while to leave
    assert 4 <= spent["evaluation"] < 7 and spent["idle"] >= 6 and spent["recomputed"] > 0 and spent["startup"] > 2
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 60 and 0 < last["goodput/percent"] < 100
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["goodput/useful_seconds"] == pytest.approx(spent["useful"], rel=0.01)


def _entries(run_dir: Path) -> list[dict]:
    return read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size else []
