"""However a rank ends, the job ends within seconds, says why once, and leaves nobody behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runbook import told
from tests.train.recipes import SMALL, recipe
from train import loop
from train.checkpoint.reader import open_checkpoint
from train.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
GIVEN = (
    "precision=fp32",
    "train.eval_every=1",
    "train.steps=5000",
    "optimizer.warmup=1",
    "optimizer.decay=1",
    "monitor.quantization.every=0",
)


class Job:
    """`torchrun -m tests.train.faulty` on two ranks, or `python -m` on one; or another module."""

    def __init__(self, run_dir: Path, *overrides: str, ranks: int = 2, module: str = "tests.train.faulty"):
        self.run_dir, self.log = run_dir, run_dir.with_name(run_dir.name + ".log")
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
        arguments = ["-cn", "tiny", *SMALL, *GIVEN, f"run.dir={run_dir}", *overrides]
        if module == "tests.train.faulty":
            arguments.append("evaluation.evaluators=[faulty]")
        self.module = module
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", *launcher, module, *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )
        self.ranks: list[psutil.Process] = []

    def text(self) -> str:
        return self.log.read_text()

    def until(self, what: Any, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        self.ranks = [p for p in psutil.Process(self.process.pid).children() if self.module in p.cmdline()]

    def until_logged(self, step: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self.until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= step)

    def wait(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        for process in (*self.ranks, self.process):
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()
        self.process.wait()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.timeout(200)
def test_a_rank_that_raises_is_named_first_and_ends_the_job(jobs: list[Job], tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "evaluation.faulty.rank=1")
    jobs.append(job)
    assert job.wait(120) != 0
    text = job.text()
    (line,) = errors(text)
    assert line.startswith("error: evaluation after step 2, on rank 1: ValueError: the sky is falling (in the evaluator 'faulty'")
    assert text.count("ValueError: the sky is falling\n") == 1  # its traceback
    assert not re.search("gloo|closed by peer", text, re.IGNORECASE)
    assert "Failed: error: evaluation after step 2, on rank 1" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_rank_that_is_killed_is_named_and_ends_the_job(jobs: list[Job], tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "evaluation.faulty.rank=1", "evaluation.faulty.what=kill")
    jobs.append(job)
    job.until_logged(1)
    assert job.wait(30) != 0
    (line,) = errors(job.text())
    told("A run was killed", line, "died without a word")
    assert not re.search("gloo|closed by peer", job.text(), re.IGNORECASE)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ranks_end_with_their_launcher(jobs: list[Job], tmp_path: Path) -> None:
    job = Job(tmp_path / "run")
    jobs.append(job)
    job.until_logged(1)
    assert len(job.ranks) == 2
    job.process.kill()
    _, alive = psutil.wait_procs(job.ranks, timeout=8)
    assert not alive
    told("A run was killed", job.text(), "because the launcher")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_torchrun_asked_to_stop_leaves_a_checkpoint_of_all_ranks(jobs: list[Job], tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "evaluation.faulty.step=-1")
    jobs.append(job)
    job.until_logged(2)
    job.process.terminate()
    job.wait(30)
    text = job.text()
    (line,) = (line for line in text.splitlines() if line.startswith("Stopped by "))
    step = int(re.findall(r"Stopped by SIGTERM after step (\d+) of 5,000", line)[0])
    assert not errors(text)
    assert open_checkpoint(tmp_path / "run").step == step == read_metrics(tmp_path / "run")[-1]["step"]
    assert not psutil.wait_procs(job.ranks, timeout=5)[1]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_local_launcher_passes_signals_on_and_ends_without_a_traceback(jobs: list[Job], tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "ranks=2", ranks=1, module="launch.local")
    jobs.append(job)
    job.until_logged(2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 75
    assert job.text().count("Stopped by SIGUSR1 after step") == 1
    told("The time limit of a job nears", job.text(), "Stopped by SIGUSR1")
    assert "Traceback" not in job.text() and not errors(job.text())


@pytest.mark.timeout(200)
def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(jobs: list[Job], tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "evaluation.faulty.what=hang", ranks=1)
    jobs.append(job)
    job.until(lambda: "hanging" in job.text())
    overrides = [*GIVEN, f"run.dir={tmp_path / 'run'}", "run.stop_after=3"]
    with pytest.raises(ValueError, match=rf"run.dir=.* is in use by process {job.process.pid} on host .* since 20\d\d-.*: wait until"):
        loop.run(recipe(*overrides))
    job.process.send_signal(signal.SIGINT)
    job.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    job.process.send_signal(signal.SIGINT)
    assert job.wait(5) == 130  # at once, out of a step that hangs
    assert "Traceback" not in job.text()
    assert (tmp_path / "run" / "lock").exists()
    assert loop.run(recipe(*overrides)) == 0
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.timeout(100)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_before_the_first_step_is_one_line(name: str, jobs: list[Job], tmp_path: Path) -> None:
    job = Job(tmp_path / "run", ranks=1, module="train")
    jobs.append(job)
    time.sleep(1.5)  # among the imports
    job.process.send_signal(getattr(signal, name))
    assert job.wait(30) == 75
    assert job.text().splitlines() == [f"Stopped by {name} before the first step: start the same command again to begin."]


def test_a_defect_names_step_samples_and_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = loop.build

    def broken(*arguments: Any) -> Any:
        run = build(*arguments)
        mixer: Any = run.chunks[0].layers["1"].mixer
        forward, calls = mixer.shared_experts.forward, 0

        def fails(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise IndexError("out of mixers\nand of luck")
            return forward(*given)

        monkeypatch.setattr(mixer.shared_experts, "forward", fails)
        return run

    monkeypatch.setattr(loop, "build", broken)
    with pytest.raises(IndexError, match="out of mixers"):
        loop.run(recipe(*GIVEN, f"run.dir={tmp_path / 'run'}", "train.eval_every=0"))
    (line,) = errors(capsys.readouterr().err)
    assert re.fullmatch(r"error: step 2, samples 8 to 15, in layers\.1\.mixer[.\w]* \(\w+\): IndexError: out of mixers", line)
    assert "Failed: out of mixers" in (tmp_path / "run" / "log.txt").read_text()
