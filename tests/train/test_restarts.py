"""Under torchrun a job whose rank or node dies is started again by its supervisor, and goes on from its checkpoint."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.train.recipes import SMALL, recipe
from train import loop
from train.observe.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
GIVEN = (
    *SMALL,
    "precision=fp32",
    "train.steps=40",
    "train.eval_every=10",
    "checkpoint.every=5",
    "monitor.quantization.every=0",
)


@pytest.fixture
def agents() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for agent in started:
        end(agent)


def start(agents: list[subprocess.Popen[bytes]], log: Path, run_dir: Path, *launch: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *launch, "-m", "train", "-cn", "tiny", *GIVEN]
    with log.open("wb") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        agent = subprocess.Popen([*command, f"run.dir={run_dir}"], cwd=ROOT, env=environment, stdout=output, stderr=output)
    agents.append(agent)
    return agent


def end(agent: subprocess.Popen[bytes]) -> None:
    """Kills an agent and its ranks, as a machine that is lost."""
    with suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    agent.wait()


def until_logged(agent: subprocess.Popen[bytes], run_dir: Path, steps: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        assert agent.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def losses(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss/lm"], row["grad_norm"], row.get("eval/loss", 0.0)) for row in read_metrics(run_dir)]


def test_a_dead_rank_is_replaced(agents: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    launch = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    log, run_dir = tmp_path / "log", tmp_path / "run"
    agent = start(agents, log, run_dir, *launch)
    until_logged(agent, run_dir, 13, log)
    victim = next(p for p in psutil.Process(agent.pid).children() if p.environ().get("RANK") == "1")
    victim.kill()
    assert agent.wait(200) == 0, log.read_text()
    text = log.read_text()
    assert f"rank 1 (process {victim.pid} on host" in text and "died without a word" in text and "Resuming" in text
    undisturbed = start(agents, tmp_path / "log2", tmp_path / "whole", *launch)
    assert undisturbed.wait(200) == 0
    assert losses(run_dir) == losses(tmp_path / "whole") and len(losses(run_dir)) == 40


def test_a_lost_node_leaves_fewer_ranks_and_the_same_batch(agents: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "job")
    elastic = (*meeting, "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "--rdzv-conf", "last_call_timeout=5")
    log, run_dir = tmp_path / "log", tmp_path / "run"
    first = start(agents, log, run_dir, *elastic)
    time.sleep(2)  # the first holds the meeting, and stays
    second = start(agents, tmp_path / "log2", run_dir, *elastic)
    until_logged(first, run_dir, 13, log)
    end(second)
    assert first.wait(300) == 0, log.read_text()
    text = log.read_text() + (tmp_path / "log2").read_text()
    assert "2 ranks on cpu" in text and "1 rank on cpu" in text and "Resuming" in text
    assert loop.run(recipe(*GIVEN[len(SMALL) :], f"run.dir={tmp_path / 'whole'}")) == 0
    ours, theirs = losses(run_dir), losses(tmp_path / "whole")
    assert len(ours) == 40
    for mine, alone in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(alone, rel=2e-6)
