"""The console: what a person reads, the same in log.txt."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest

from tests.train.observe.examples import metrics_of, run_info
from train.observe.console import Console
from train.observe.lines import duration


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Drawn:
    path = Path("runs/x/report/loss.png")


def test_console_tells_the_whole_story(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(Drawn(), stream, clock)  # type: ignore[arg-type]
    console.say("W&B: offline")
    console.on_start(run_info(tmp_path, description=("data        six novels",), precision_table="TABLE\n"))
    for step in range(1, 6):
        clock.now += 2.0
        console.on_step(metrics_of(step))
    console.on_evaluation({"step": 5, "tokens": 1, "eval/loss": 2.0, "eval/bits_per_byte": 2.8854, "eval/tasks/arc": 0.25})
    console.on_checkpoint(5, tmp_path / "checkpoints" / "step-00000005")
    console.on_end(
        {"step": 10, "eval/loss": 1.8, "eval/bits_per_byte": 2.4, "baseline/trigram": 1.9102, "seconds": 185.0, "session_seconds": 125.0}
    )
    text = stream.getvalue()
    assert text == (tmp_path / "log.txt").read_text()
    for expected in (
        "1,234,567 (1,000,000 active per token)",
        "pattern=ME*E/*E hidden_size=64",
        "10 steps x 2,048 tokens = 20.5k tokens",
        "data        six novels",
        "TABLE",
        "W&B: offline",
        "step  5/10  loss 1.0000  mtp 1.1000 1.2000  grad 0.500  lr 4.00e-03  12.3k tok/s  mfu 17.6%  left 10s",
        "step  5/10  validation loss 2.0000 nats per token, 2.8854 bits per byte  tasks/arc 0.25\n",
        "step-00000005",
        "Finished 10 steps; this session took 2m 05s of 3m 05s in all",
        "validation loss  1.8000 nats per token, 2.4000 bits per byte; 0.1102 below a trigram count model's 1.9102 (2.5469 bits) on",
        "runs/x/report/loss.png",
        f"run directory    {tmp_path}",
    ):
        assert expected in text, expected
    assert text.index("TABLE") < text.index("W&B: offline") < text.index("step  1/10")
    assert not any(ord(character) < 32 and character != "\n" for character in text)


def test_console_says_when_a_run_stopped_or_lost_to_the_baseline(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(None, stream)
    console.on_start(run_info(tmp_path, total=60))
    console.on_step(metrics_of(30))
    console.on_end({"step": 30, "stopped": "run.stop_after=30steps", "eval/loss": 2.5, "baseline/trigram": 1.9})
    assert "Stopped (run.stop_after=30steps) after step 30 of 60" in stream.getvalue()
    assert "0.6000 above a trigram count model's 1.9000" in stream.getvalue()
    console = Console(None, stream)
    console.on_start(run_info(tmp_path, step=30, total=60))
    assert f"Resuming {tmp_path} after step 30 of 60" in stream.getvalue()
    assert (tmp_path / "log.txt").read_text() == stream.getvalue()  # the second session is appended


def test_console_prints_a_diverged_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(None, stream)
    console.on_start(run_info(tmp_path))
    console.on_step({"step": 1, "tokens": 1, "loss/lm": math.nan, "grad_norm": math.inf})
    assert "loss nan  grad inf" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.94, "9.9s"), (59.6, "1m 00s"), (185, "3m 05s"), (7620, "2h 07m"), (356400, "4d 03h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
