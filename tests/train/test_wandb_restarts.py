"""The command, five times killed or stopped: W&B has one run, every metric of every step once, and the numbers of metrics.jsonl."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.numbers import numbers_in
from tests.train.observe.test_wandb import without_service, written
from train.observe.metrics import decode_lines, read_metrics
from train.observe.wandb_records import RecordReader, files_of

ROOT = Path(__file__).parents[2]
KEY = "5ecre7" * 6 + "beef"
SHORT = (
    "train.steps=60 train.log_every=1 train.eval_every=10 train.sequence_length=32 train.global_batch_size=4 precision=fp32 "
    "checkpoint.every=10 data.validation_fraction=0.001 monitor.picture=true monitor.wandb_timeout_seconds=120"
).split()
# (signal, the logged step it comes after): before any checkpoint, behind one, by rank 0 and by its service as well
ENDS = ((signal.SIGKILL, 6), (signal.SIGTERM, 14), (signal.SIGKILL, 27), (signal.SIGUSR1, 33), (signal.SIGKILL, 48))


def start(run_dir: Path, *overrides: str, key: str = KEY) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "train", "-cn", "tiny", *SHORT, f"run.dir={run_dir}", *overrides]
    environment = {**without_service(), "WANDB_API_KEY": key, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(run_dir: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while True:
        path = run_dir / "metrics.jsonl"
        entries = decode_lines(path.read_bytes()) if path.exists() else []
        if entries and entries[-1]["step"] >= step:
            return
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.02)


def same(value: Any, other: Any) -> bool:
    return value == other or (isinstance(value, float) and math.isnan(value) and isinstance(other, float) and math.isnan(other))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_five_restarts_are_one_line(tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", []
    for number, step in ENDS:
        process = start(run_dir)
        wait_for(run_dir, step, process)
        process.send_signal(number)
        said.append(process.communicate(timeout=200)[0])
        assert process.returncode in (-signal.SIGKILL, 75), said[-1]
    last = start(run_dir, "parallel.distributed_optimizer=false")
    said.append(last.communicate(timeout=280)[0])
    assert last.returncode == 0, said[-1]

    run_id = (run_dir / "wandb_id").read_text().strip()
    files = files_of(run_dir, run_id)
    assert len(files) >= 5 and all(path.name.endswith(run_id) for path in (run_dir / "wandb").glob("*run-*-*"))
    rows, truth = written(run_dir), read_metrics(run_dir)
    assert [row["_step"] for row in rows] == [entry["step"] for entry in truth] == list(range(1, 61))
    for row, entry in zip(rows, truth, strict=True):
        lacking = [key for key, value in numbers_in(entry).items() if not same(row.get(key), value)]
        assert not lacking, (entry["step"], lacking)
    assert [row["step"] for row in rows if "eval/loss" in row] == [10, 20, 30, 40, 50, 60]
    exits = [r.exit.exit_code for file in files for r in RecordReader(file).new() if r.WhichOneof("record_type") == "exit"]
    assert exits[-1] == 0 and 75 in exits

    assert not any(KEY in text for text in said)
    for path in run_dir.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert os.environ.get("WANDB_API_KEY") != KEY


def test_a_key_in_a_recipe_is_repeated_by_nobody(tmp_path: Path) -> None:
    """One that no variable of the environment knows."""
    process = start(tmp_path / "run", f"+monitor.wandb_api_key={KEY}", "train.steps=1", key="")
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 2 and KEY not in text and "monitor.wandb_api_key" in text
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
