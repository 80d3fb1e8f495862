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


@pytest.mark.timeout(180)
def test_two_ranks_train_and_finish(tmp_path: Path) -> None:
    overrides = [
        "train.steps=3",
        "optimizer.warmup=1",
        "optimizer.decay=1",
        "precision=fp32",
        "parallel.tensor=2",
        f"run.dir={tmp_path / 'run'}",
    ]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", "ranks=2", "-cn", "tiny", *SMALL, *overrides],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert "2 ranks on cpu: tensor 2 + sequence" in done.stdout
    assert done.stdout.count("Finished 3 steps") == 1  # one rank speaks
