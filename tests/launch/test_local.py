"""The torchrun starter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import command, main
from tests.train.recipes import SMALL
from train.observe.metrics import read_metrics


def test_command() -> None:
    assert command(["ranks=3", "-cn", "tiny", "a=b"])[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"),
        *("-m", "train", "-cn", "tiny", "a=b"),
    ]


def test_wrong_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks=none"]) == 2
    assert capsys.readouterr().err == "error: ranks=none is no number of ranks: use for instance ranks=2\n"


def start(run_dir: Path, ranks: int, *overrides: str) -> str:
    """Three steps of a small `tiny` on several ranks; what was printed."""
    root = Path(__file__).resolve().parents[2]
    length = ("train.steps=3", "optimizer.warmup=1", "optimizer.decay=1", f"run.dir={run_dir}")
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", f"ranks={ranks}", "-cn", "tiny", *SMALL, *length, *overrides],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(180)
def test_two_ranks_train_and_finish(tmp_path: Path) -> None:
    printed = start(tmp_path / "run", 2, "precision=fp32", "parallel.tensor=2")
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert "2 ranks on cpu: tensor 2 + sequence" in printed
    assert printed.count("Finished 3 steps") == 1  # one rank speaks


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.expert=2",),
        ("parallel.pipeline=2",),
        ("parallel.distributed_optimizer=false",),
        ("parallel.distributed_optimizer=true",),
        ("parallel.tensor=2", "parallel.expert=2", "precision=bf16"),  # halves of so small a model are no multiples of 16
    ],
    ids=" ".join,
)
def test_every_layout_stops_resumes_and_finishes(tmp_path: Path, layout: tuple[str, ...]) -> None:
    ranks = 4 if "parallel.tensor=2" in layout else 2
    start(tmp_path / "whole", ranks, *layout)
    assert "Stopped" in start(tmp_path / "halves", ranks, *layout, "run.stop_after=2")
    start(tmp_path / "halves", ranks, *layout)
    ours, theirs = (read_metrics(tmp_path / name) for name in ("halves", "whole"))
    assert [m["step"] for m in ours] == [1, 2, 3] and "eval/loss" in ours[-1]
    for a, b in zip(ours, theirs, strict=True):
        assert (a["loss/lm"], a["grad_norm"]) == (b["loss/lm"], b["grad_norm"])
