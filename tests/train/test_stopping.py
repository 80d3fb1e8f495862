"""A signal at the worst moment: the run stops with a checkpoint, and goes on as if nothing had happened."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.numbers import numbers
from tests.train.recipes import recipe
from train import loop, training
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.reader import open_checkpoint
from train.evaluation.validation import ValidationLoss
from train.observe.metrics import MetricsFile, read_metrics
from train.signals import STOPPED, StopRequested, StopSignals

GIVEN = ("precision=fp32", "train.steps=6", "optimizer.warmup=1", "optimizer.decay=2", "train.eval_every=2", "checkpoint.every=3")


def outcome(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Every metric that is no time, and every tensor of the last checkpoint."""
    checkpoint = open_checkpoint(run_dir)
    return numbers(run_dir), {name: checkpoint.read_full(name) for name in checkpoint.manifest.tensors}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert loop.run(recipe(*GIVEN, f"run.dir={run_dir}")) == 0
    return run_dir


def at_call(number: int, before: Callable[..., Any]) -> Callable[..., Any]:
    """`before`, which gets a SIGTERM in the middle of its call number `number`."""
    calls = 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*arguments, **named)

    return interrupted


@pytest.mark.parametrize(
    ("place", "call", "step"),
    [
        ((training, "train_step"), 2, 2),  # where an evaluation is due, which the resumed run still owes
        ((ValidationLoss, "evaluate"), 2, 4),
        ((Checkpointer, "save"), 1, 3),
        pytest.param((training, "train_step"), 5, 5, marks=pytest.mark.slow),
        pytest.param((MetricsFile, "on_step"), 4, 4, marks=pytest.mark.slow),
    ],
    ids=["a step before an evaluation", "an evaluation", "a checkpoint", "a step", "an observer"],
)
def test_stopped_anywhere_and_continued(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: tuple[Any, str],
    call: int,
    step: int,
) -> None:
    given = recipe(*GIVEN, f"run.dir={tmp_path / 'run'}")
    monkeypatch.setattr(*place, at_call(call, getattr(*place)))
    before = signal.getsignal(signal.SIGTERM)
    assert loop.run(given) == STOPPED == 75
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert open_checkpoint(tmp_path / "run").step == step
    assert f"Stopped by SIGTERM after step {step} of 6" in capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "run" / "finished.json").exists() and not (tmp_path / "run" / "lock").exists()
    assert loop.run(given) == 0
    (ours, our_tensors), (theirs, their_tensors) = outcome(tmp_path / "run"), outcome(whole)
    assert ours == theirs
    assert our_tensors.keys() == their_tensors.keys() and all(torch.equal(t, their_tensors[name]) for name, t in our_tensors.items())
    finished, expected = (json.loads((path / "finished.json").read_text()) for path in (tmp_path / "run", whole))
    assert finished["eval/loss"] == expected["eval/loss"]


def test_stopped_while_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loop, "build", at_call(1, loop.build))
    assert loop.run(recipe(*GIVEN, f"run.dir={tmp_path / 'run'}")) == STOPPED
    assert capsys.readouterr().err == "Stopped by SIGTERM before the first step: start the same command again to begin.\n"
    assert not (tmp_path / "run").exists()


def test_phases_of_a_step_and_bits_per_byte_are_logged(whole: Path) -> None:
    entries = read_metrics(whole)
    for entry in entries:
        phases = [entry[f"seconds/{name}"] for name in ("data", "forward_backward", "optimizer", "other")]
        assert all(seconds >= 0 for seconds in phases) and sum(phases) == pytest.approx(entry["step_seconds"], rel=0.02)
        assert entry["seconds/forward_backward"] > 0.3 * entry["step_seconds"]
        if entry["step"] % 2 == 0:  # one token a byte, but for the end of a document, which is no byte of text
            assert entry["seconds/evaluation"] > 0
            assert entry["eval/bits_per_byte"] == pytest.approx(entry["eval/loss"] / 0.6931472, rel=0.01)
    standing = [entry["step"] for entry in entries if "seconds/checkpoint" in entry]
    assert standing[0] == 4 and set(standing) <= {4, 5, 6}  # begun after step 3, complete when its files are written


def test_a_signal_whose_exception_was_swallowed_is_not_lost() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as outer:
        with contextlib.suppress(BaseException):  # as an import or a destructor may do
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # where the signal arrives
        assert outer.received == signal.SIGTERM
        with pytest.raises(StopRequested, match="SIGTERM"), StopSignals():
            pass
    assert signal.getsignal(signal.SIGTERM) == before
