"""A run that was stopped or killed and started again is, bit for bit, the run that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.recipes import SMALL, recipe
from train import loop
from train.checkpoint.reader import open_checkpoint
from train.observe.metrics import read_metrics
from train.train_step import train_step

LENGTH = ("train.steps=36", "optimizer.decay=12")
DETERMINISTIC = (
    "loss/lm",
    "loss/mtp_1",
    "loss/mtp_2",
    "loss/total",
    "grad_norm",
    "learning_rate",
    "moe/max_violation",
    "moe/aux_loss",
)


def outcome(run_dir: Path) -> tuple[list[tuple[Any, ...]], dict[str, torch.Tensor]]:
    """What must not depend on interruptions: the metrics of every step, and every tensor of the last checkpoint."""
    metrics = read_metrics(run_dir)
    checkpoint = open_checkpoint(run_dir)
    tensors = {name: checkpoint.read_full(name) for name in checkpoint.manifest.tensors}
    return [(m["step"], *(m[key] for key in DETERMINISTIC)) for m in metrics], tensors


def assert_same(a: Path, b: Path) -> None:
    (ours, our_tensors), (theirs, their_tensors) = outcome(a), outcome(b)
    assert [m[0] for m in ours] == list(range(1, 37))
    assert ours == theirs
    assert our_tensors.keys() == their_tensors.keys()
    for name, tensor in our_tensors.items():
        assert torch.equal(tensor, their_tensors[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert loop.run(recipe(*LENGTH, f"run.dir={run_dir}")) == 0
    return run_dir


def test_nvfp4_with_stochastic_rounding_is_what_runs(uninterrupted: Path) -> None:
    metrics = read_metrics(uninterrupted)[-1]
    assert metrics["precision/share/nvfp4"] > 0.2
    assert json.loads((uninterrupted / "finished.json").read_text())["step"] == 36


@pytest.mark.slow
def test_stopped_and_continued(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "stopped"
    where = f"run.dir={run_dir}"
    assert loop.run(recipe(*LENGTH, where, "run.stop_after=18steps", "monitor.wandb=offline")) == 0
    assert not (run_dir / "finished.json").exists()
    assert [m["step"] for m in read_metrics(run_dir)] == list(range(1, 19))
    identity = (run_dir / "wandb_id").read_text()
    assert loop.run(recipe(*LENGTH, where, "monitor.wandb=offline")) == 0
    assert (run_dir / "wandb_id").read_text() == identity
    assert "run.stop_after: 18 -> None" in capsys.readouterr().out
    assert_same(run_dir, uninterrupted)


@pytest.mark.timeout(200)
def test_killed_and_continued(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "train",
        "-cn",
        "tiny",
        *SMALL,
        *LENGTH,
        f"run.dir={run_dir}",
        "checkpoint.every=10",
        "monitor.wandb=offline",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        deadline = time.monotonic() + 120
        while not (run_dir / "checkpoints" / "step-00000020").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (run_dir / "finished.json").exists()
    identity = (run_dir / "wandb_id").read_text()
    assert loop.run(recipe(*LENGTH, f"run.dir={run_dir}", "checkpoint.every=10", "monitor.wandb=offline")) == 0
    assert (run_dir / "wandb_id").read_text() == identity
    assert_same(run_dir, uninterrupted)


def test_a_changed_recipe_is_refused_in_one_sentence(uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match=r"run.seed=2 differs from 1, with which the run in .* began: set it back"):
        loop.run(recipe(*LENGTH, f"run.dir={uninterrupted}", "run.seed=2"))


def test_places_that_cannot_be_used_are_one_sentence(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run.dir=.*file cannot be used, because .* is no directory"):
        loop.run(recipe(*LENGTH, f"run.dir={tmp_path / 'file'}"))
    with pytest.raises(ValueError, match=r"nowhere"):
        loop.run(recipe(*LENGTH, f"run.dir={tmp_path / 'new'}", f"checkpoint.initialize_from={tmp_path / 'nowhere'}"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "recipe.yaml").write_text((uninterrupted / "recipe.yaml").read_text())
    for name, text in (("metrics.jsonl", '{"step": 1}\nnothing\n{"step": 2}\n'), ("finished.json", "{")):
        (damaged / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} is damaged") as error:
            loop.run(recipe(*LENGTH, f"run.dir={damaged}"))
        assert "\n" not in str(error.value)


def test_a_secret_in_a_value_is_stored_nowhere_and_does_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "opensesame")
    given = ("train.steps=4", "optimizer.warmup=1", "optimizer.decay=1", f"run.dir={tmp_path / 'run'}", "run.name=opensesame")
    assert loop.run(recipe(*given, "run.stop_after=2steps")) == 0
    assert loop.run(recipe(*given)) == 0
    assert "opensesame" not in capsys.readouterr().out
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"opensesame" not in path.read_bytes(), path


def test_a_finished_run_is_not_repeated(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert loop.run(recipe(*LENGTH, f"run.dir={uninterrupted}")) == 0
    assert "is finished" in capsys.readouterr().out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_gradients_that_are_not_finite_never_reach_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loop.build(recipe(f"run.dir={tmp_path}"))
    try:
        train_step(made, 0)
        before = {name: p.detach().clone() for name, p in made.chunks[0].state_dict().items()}
        forward = made.chunks[0].norm_f.forward
        monkeypatch.setattr(made.chunks[0].norm_f, "forward", lambda x: forward(x) * float("nan"))
        assert train_step(made, 1)["taken"] == 0.0
        monkeypatch.undo()
        for name, value in made.chunks[0].state_dict().items():
            if not name.endswith((".load", ".loss")):
                assert torch.equal(value, before[name]), name
        assert train_step(made, 2)["taken"] == 1.0
    finally:
        loop.groups.shutdown()
