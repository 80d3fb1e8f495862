"""Killed while it goes back: the run started again goes back once more where nothing says yet that it did, and ends as the run that never saw those
samples."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.incidents_killed import MOMENTS
from tests.train.test_incidents import curve, same_end
from train.checkpoint.reader import open_checkpoint
from train.run_directory import read_history

ROOT = Path(__file__).resolve().parents[2]


def start(run_dir: Path, moment: str) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.incidents_killed", str(run_dir), moment]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240).returncode


@pytest.fixture(scope="module")
def spared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle: a run that never sees samples 40 to 55."""
    run_dir = tmp_path_factory.mktemp("oracle") / "run"
    assert start(run_dir, "spared") == 0  # in a process of its own as the others: with another number of threads sums round otherwise
    return run_dir


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("moments", [["the old checkpoint makes room"], list(MOMENTS)])
def test_killed_while_it_goes_back(moments: list[str], spared: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for moment in moments:
        assert start(run_dir, moment) == -signal.SIGKILL, f"never came by: {moment}"
    assert start(run_dir, "none") == 0
    assert curve(run_dir) == curve(spared)
    assert same_end(run_dir, spared)
    incidents = open_checkpoint(run_dir).state["incidents"]
    assert (incidents["rewinds"], incidents["skipped_samples"]) == (1, [[40, 56]])
    assert [entry["skipped_samples"] for entry in read_history(run_dir) if "skipped_samples" in entry][-1] == [[40, 56]]
