"""launch/torchrun.sh: one line, the same on each node."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_preflight import free_port
from tests.train.recipes import SMALL
from train.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["sh", "launch/torchrun.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_several_nodes_need_a_place_to_meet() -> None:
    _, errors = (launcher := start("-cn", "tiny", NODES="2", RANKS="1")).communicate(timeout=60)
    assert launcher.returncode == 2 and errors == "error: NODES=2 needs FIRST=host:port, the node where all meet\n"


@pytest.mark.slow
def test_two_nodes(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    line = ["-cn", "tiny", *SMALL, "train.steps=2", "optimizer.warmup=1", "optimizer.decay=1", f"run.dir={run}"]
    first = f"127.0.0.1:{free_port()}"
    nodes = [start(*line, NODES="2", RANKS="1", FIRST=first) for _ in range(2)]
    said = [node.communicate(timeout=280) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert any("2 ranks on cpu" in printed for printed, _ in said)
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
