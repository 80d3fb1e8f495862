"""A run that goes on in one layout after another, through the command line, has the losses of the run that one rank did alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.recipes import SMALL
from train.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ("precision=fp32", "train.steps=8", "optimizer.warmup=1", "optimizer.decay=0", "data.validation_fraction=0.0005")
LEGS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    (2, ("parallel.expert_tensor=2",)),
    (1, ()),
    (2, ("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")),
    (2, ("parallel.pipeline=2", "model.pattern='M|EM*EME/*E/*E'")),
)


def start(ranks: int, *overrides: str) -> str:
    command = ["train"] if ranks == 1 else ["launch.local", f"ranks={ranks}"]
    line = [sys.executable, "-W", "ignore", "-m", *command, "-cn", "tiny", *SMALL, *GIVEN, *overrides]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_layout_after_another(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    start(1, f"run.dir={whole}")
    start(1, f"run.dir={run}", "run.stop_after=1")
    for step, (ranks, layout) in enumerate(LEGS, start=2):
        printed = start(ranks, f"run.dir={run}", f"run.stop_after={step}", *layout)
        assert f"after step {step - 1}" in printed and f"{ranks} rank" in printed
    start(1, f"run.dir={run}")
    ours, theirs = read_metrics(run), read_metrics(whole)
    assert [m["step"] for m in ours] == [m["step"] for m in theirs] == list(range(1, 9))
    for mine, expected in zip(ours, theirs, strict=True):
        for key in ("loss/lm", "loss/mtp_1", "loss/mtp_2", "grad_norm", "moe/aux_loss"):
            assert mine[key] == pytest.approx(expected[key], rel=2e-6), (key, mine["step"])
