"""Runs that a real Slurm starts, asks to stop, puts back into the queue and loses nodes of, with the numbers of a run left alone."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.runbook import told
from tests.slurm.cluster import Cluster, missing, running, stopped
from tests.train.numbers import numbers
from tests.train.recipes import SMALL
from train.observe.metrics import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(7200)]
ROOT = Path(__file__).resolve().parents[2]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
LONG = 1800  # seconds; far more than anything takes, so that a busy machine fails no test


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        pytest.fail(why)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Started:
    """A run that `python -m launch.slurm` submits."""

    def __init__(self, slurm: Cluster, directory: Path, *overrides: str, nodes: int = 2, ranks: int = 2) -> None:
        self.slurm, self.directory = slurm, directory
        cluster = ("cluster=cpu", f"cluster.nodes={nodes}", f"cluster.devices_per_node={ranks}", "cluster.slurm.retries=2")
        preflight = ("gemm_share=0.01", "disk_bytes=1000000", "bandwidth_bytes=1000000", "gemm_seconds=0.2", "disk_bytes_per_second=1000")
        self.arguments = ["-cn", "tiny", *SMALL, *cluster, *(f"cluster.preflight.{key}" for key in preflight), *overrides]

    def submit(self, *more: str) -> str:
        where = [] if "-m" in more else [f"run.dir={self.directory}"]
        printed = self.slurm.ask(
            sys.executable, "-W", "ignore", "-m", "launch.slurm", *self.arguments, *where, *more, cwd=ROOT, timeout=LONG,
            environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        found = re.search(r"submitted job (\d+)", printed)
        assert found is not None, printed
        self.job = found.group(1)
        return self.job

    def step(self) -> int:
        """The last one logged."""
        with contextlib.suppress(ValueError):
            return int(read_metrics(self.directory)[-1]["step"])
        return 0

    def reach(self, step: int) -> None:
        def reached() -> bool:
            state = self.slurm.state(self.job)["JobState"]
            assert state not in OVER or self.step() >= step, f"the job is {state} at step {self.step()}\n{self.logs()}"
            return self.step() >= step

        self.slurm.wait(reached, LONG, f"step {step} is not reached")

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-800:]}" for path in sorted((self.directory / "logs").glob("*.log"))
        )

    def finish(self, job: str, state: str = "COMPLETED") -> None:
        self.slurm.wait(lambda: self.slurm.state(job)["JobState"] in OVER, LONG, f"job {job} does not end\n{self.logs()}")
        assert self.slurm.state(job)["JobState"] == state, self.logs()


def command(slurm: Cluster, *line: str) -> str:
    return slurm.ask(sys.executable, "-W", "ignore", "-m", *line, cwd=ROOT, timeout=LONG)


def test_a_run_of_four_ranks_survives_and_keeps_its_numbers(slurm: Cluster, tmp_path: Path) -> None:
    """Asked to stop and requeued; a rank killed; a node lost: bit for bit the metrics of a run that was left alone."""
    length = ("train.steps=100", "checkpoint.every=15", "run.seed=3")
    alone = Started(slurm, tmp_path / "alone", *length)
    job = alone.submit()
    alone.finish(job)
    assert "4 ranks on cpu" in (alone.directory / "log.txt").read_text()
    assert "2 nodes, 4 ranks fit" in (alone.directory / "logs/preflight.log").read_text()

    run = Started(slurm, tmp_path / "it is a run", *length, "cluster.preflight.enabled=false")  # seen above; it costs three starts
    job = run.submit()
    run.reach(20)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)  # what Slurm does before the time limit
    slurm.wait(lambda: slurm.state(job)["JobState"] == "PENDING", LONG, f"job {job} is not put back into the queue\n{run.logs()}")
    told("The time limit of a job nears", command(slurm, "launch.status", str(run.directory)), "PENDING")
    slurm.start_soon(job, 1)
    told("The time limit of a job nears", (run.directory / f"logs/slurm-{job}.log").read_text(), "Exited with exit code 75")
    assert "Stopped by SIGUSR1" in (run.directory / "log.txt").read_text()
    stopped_at = run.step()

    run.reach(stopped_at + 10)
    (victim, *_) = slurm.tasks("n1", "train")
    victim.kill()  # the job starts again by itself, on the same nodes
    slurm.wait(lambda: "(failure 1)" in run.logs(), LONG, f"the dead rank ended nothing\n{run.logs()}")
    slurm.wait(lambda: bool(slurm.tasks("n1", "train")), LONG, "the ranks were not started again")
    again = run.step()
    run.reach(again + 10)
    assert slurm.state(job)["Restarts"] == "1"

    status = command(slurm, "launch.status", str(run.directory))
    assert f"{job} RUNNING" in status and "on n[0-1] after 1 restart" in status and "checkpoint  step-" in status, status
    slurm.kill_node("n1")
    slurm.wait(lambda: slurm.state(job)["Restarts"] == "2", LONG, f"Slurm did not requeue the job of a lost node\n{run.logs()}")
    slurm.start_node("n1")
    run.finish(job)  # after the two minutes that Slurm waits: made to start at once, Slurm 22.05 takes the node for lost still

    assert numbers(run.directory) == numbers(alone.directory)
    assert [line["step"] for line in read_metrics(run.directory)] == list(range(1, 101))
    printed = command(slurm, "launch.logs", str(run.directory), "lines=400")
    assert "(failure 1)" in printed and "Finished 100 steps" in printed
    assert (run.directory / "logs/rank-00003.log").exists() and (run.directory / "slurm.sh").exists()
    assert "COMPLETED" in command(slurm, "launch.status", str(run.directory))


def test_scancel_ends_a_run_for_good(slurm: Cluster, tmp_path: Path) -> None:
    run = Started(slurm, tmp_path / "run", "train.steps=100000", nodes=1)
    job = run.submit()
    refused = slurm.ask(
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "launch.slurm",
        *run.arguments,
        f"run.dir={run.directory}",
        cwd=ROOT,
        check=False,
        timeout=LONG,
    )
    assert "submitted" not in refused  # one job at a time
    run.reach(5)
    slurm.ask("scancel", job)
    run.finish(job, "CANCELLED")
    slurm.wait(lambda: not slurm.tasks("n0", "train"), 60, "ranks live on")
    assert list(run.directory.glob("checkpoints/step-*/manifest.json")), run.logs()
    assert slurm.state(job)["Restarts"] == "0"


def test_a_chain_goes_on_without_requeueing(slurm: Cluster, tmp_path: Path) -> None:
    run = Started(slurm, tmp_path / "run", "train.steps=400", "cluster.slurm.requeue=false", "cluster.slurm.chain=3", nodes=1)
    job = run.submit()
    run.reach(5)
    slurm.ask("scancel", "--batch", "--signal=USR1", f"{job}_1", check=False)  # it tries again while the job starts, and may find it over
    run.finish(f"{job}_1", "FAILED")
    run.finish(f"{job}_2")
    assert run.step() == 400 and "Stopped by SIGUSR1" in (run.directory / "log.txt").read_text()
    slurm.wait(lambda: not slurm.ask("squeue", "-h", "-j", job, check=False).strip(), 60, "the third job was not cancelled")


def test_a_sweep_is_one_array(slurm: Cluster, tmp_path: Path) -> None:
    sweep = Started(slurm, tmp_path, "train.steps=3", "optimizer.warmup=1", "optimizer.decay=1", nodes=1)
    job = sweep.submit("-m", f"run.dir={tmp_path}/a,{tmp_path}/b")
    assert sorted(slurm.ask("squeue", "-h", "-j", job, "-r", "-o", "%i").split()) == [f"{job}_0", f"{job}_1"]
    for name in ("a", "b"):
        slurm.wait(lambda name=name: (tmp_path / name / "finished.json").exists(), LONG, f"{name} does not finish")  # type: ignore[misc]
        assert f"{job}_" in json.loads((tmp_path / name / "jobs.jsonl").read_text())["job"]
    assert "finished    step 3" in command(slurm, "launch.status", str(tmp_path / "a"))


def test_a_preflight_stops_a_bad_node_before_training(slurm: Cluster, tmp_path: Path) -> None:
    """The first rank of n1 is stopped before it comes, as one on a machine that hangs."""
    run = Started(
        slurm, tmp_path / "run", "cluster.preflight.patience_seconds=60", "train.steps=3", "optimizer.warmup=1", "optimizer.decay=1"
    )
    job = run.submit()
    slurm.wait(lambda: bool(slurm.tasks("n1", "launch.preflight")), LONG, "no preflight started")
    hung = min(slurm.tasks("n1", "launch.preflight"), key=lambda process: int(process.environ()["SLURM_PROCID"]))
    go_on = stopped(hung)
    try:
        slurm.wait(lambda: "gave no answer" in run.logs(), LONG, f"nobody missed it\n{run.logs()}")
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            hung.kill()
        go_on()
    run.finish(job, "FAILED")
    (log,) = (run.directory / "logs").glob("slurm-*.log")
    assert "error: node n1 (rank 2) gave no answer (come) within 60 s" in log.read_text()
    assert not (run.directory / "metrics.jsonl").exists() and not list((run.directory / "logs").glob("rank-*.log"))


def test_srun_alone(slurm: Cluster, tmp_path: Path) -> None:
    train = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "train",
        "-cn",
        "tiny",
        *SMALL,
        "train.steps=2",
        "optimizer.warmup=1",
        "optimizer.decay=1",
    ]
    small = {"OMP_NUM_THREADS": "1"}
    printed = slurm.ask("srun", "-N2", "-n4", *train, f"run.dir={tmp_path / 'four'}", cwd=ROOT, timeout=LONG, environment=small)
    assert "4 ranks on cpu" in printed and printed.count("Finished 2 steps") == 1
    # A shell of an allocation that has room for four tasks, but no srun: one rank.
    printed = slurm.ask("salloc", "-N2", "-n4", *train, f"run.dir={tmp_path / 'one'}", cwd=ROOT, timeout=LONG, environment=small)
    assert "1 rank on cpu" in printed
