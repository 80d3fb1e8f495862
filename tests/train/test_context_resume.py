"""A run that goes on with its sequences split over two ranks, and again on one, through the command and torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.recipes import SMALL
from train.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
GIVEN = (
    *SMALL,
    "precision=fp32",
    "train.steps=12",
    "train.eval_every=4",
    "data.reset_at_document=true",
    "data.validation_fraction=0.002",
    "monitor.quantization.every=0",
)
SPLIT = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train")


def start(run_dir: Path, launch: tuple[str, ...], *overrides: str) -> None:
    command = [sys.executable, "-W", "ignore", *launch, "-cn", "tiny", *GIVEN, f"run.dir={run_dir}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["state", "all_to_all"])
def test_one_rank_then_two_that_split_sequences_then_one(way: str, tmp_path: Path) -> None:
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    start(whole, ("-m", "train"))
    start(changing, ("-m", "train"), "run.stop_after=4")
    start(changing, SPLIT, "parallel.context=2", f"parallel.context_mamba={way}", "run.stop_after=8")
    start(changing, ("-m", "train"))
    ours, theirs = list(read_metrics(changing)), list(read_metrics(whole))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, 13))
    for mine, other in zip(ours, theirs, strict=True):
        keys = [key for key in other if key.startswith(("loss/", "eval/", "moe/"))]
        assert {"loss/lm", "loss/mtp_2"} <= set(keys)
        for key in (*keys, "grad_norm", "learning_rate"):
            assert mine[key] == pytest.approx(other[key], rel=2e-6), f"step {mine['step']}, {key}"
