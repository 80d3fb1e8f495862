"""The torchrun starter."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launch.local import main, parse
from tests.runbook import told
from tests.train.recipes import SMALL
from train.observe.metrics import read_metrics
from train.signals import STOPPED

ROOT = Path(__file__).resolve().parents[2]


def test_command() -> None:
    wanted = parse(["ranks=3", "-cn", "tiny", "restarts=2", "a=b"])
    assert (wanted.ranks, wanted.restarts, wanted.rest) == (3, 2, ("-cn", "tiny", "a=b"))
    line = wanted.torchrun()
    assert line[:3] == ["--standalone", "--nproc-per-node", "3"] and line[4:] == ["-m", "train", "-cn", "tiny", "a=b"]
    assert line[3].startswith("--signals-to-handle=") and "SIGUSR1" in line[3]
    assert parse(["command=train.branch", "checkpoint=runs/x"]).torchrun()[-3:] == ["-m", "train.branch", "checkpoint=runs/x"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["ranks=3", "-cn", "tiny"], "train.global_batch_size=16 is not a multiple of the 3 data-parallel ranks"),
        (["ranks=2", "-cn", "tiny", "parallel.tensor=4"], "parallel.tensor=4 does not divide the 2 ranks"),
        (["ranks=2", "-cn", "tiny", "train.stepz=3"], "did you mean train.steps?"),
        (["ranks=2", "-m", "run.seed=1,2"], "-m is a sweep"),
        (["restarts=often"], "restarts=often is no number of restarts: use for instance restarts=3"),
        (["command=train.export"], "command=train.export is none that trains: use one of train, train.branch"),
        (["command=train.branch", "checkpoint=/nowhere", "precision=bf16"], "/nowhere"),
        (["command=train.branch", "checkpoint=/nowhere", "branch=[bf16]"], "branch=[...] is a sweep"),
    ],
)
def test_a_wrong_recipe_starts_no_rank(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.torchrun.run", lambda _: pytest.fail("ranks were started"))
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and named in errors[0]


@pytest.mark.slow
def test_a_rank_that_is_refused_is_one_sentence(tmp_path: Path) -> None:
    """What only shows when files are opened, on every rank: said once, without the launcher's traceback."""
    missing = "data.phases=[{blend:[{path:/does/not/exist}]}]"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "launch.local", "ranks=2", "-cn", "tiny", f"run.dir={tmp_path / 'run'}", missing],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "/does/not/exist" in done.stderr, done.stderr


def test_wrong_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks=none"]) == 2
    assert capsys.readouterr().err == "error: ranks=none is no number of ranks: use for instance ranks=2\n"


@pytest.mark.parametrize(
    ("ends", "starts", "status"),
    [([2], 1, 2), ([75], 1, 75), ([130], 1, 130), ([1, 0], 2, 0), ([-9, 1, 3, 1], 3, 3), ([1, 75], 2, 75)],
    ids=str,
)
def test_what_is_started_again(
    ends: list[int], starts: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither what was refused nor what was asked to stop; anything else, as often as was allowed."""
    given = iter(ends)

    def run(_: object) -> None:
        if code := next(given):
            raise ChildFailedError("train", {1: ProcessFailure(1, 4711, code, "")})

    monkeypatch.setattr("launch.local.torchrun.run", run)
    assert main(["ranks=2", "restarts=2", "-cn", "tiny"]) == status
    assert len(ends) - len(list(given)) == starts
    assert capsys.readouterr().err.count("all ranks are started again") == starts - 1


def end_of(launcher: subprocess.Popen[str], run_dir: Path, steps: int) -> tuple[str, str]:
    """What a launcher has printed, one of whose ranks is killed once so many steps are logged."""
    metrics = run_dir / "metrics.jsonl"
    while launcher.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        time.sleep(0.05)
    assert launcher.poll() is None, launcher.communicate()
    next(rank for rank in psutil.Process(launcher.pid).children() if rank.environ().get("RANK") == "1").kill()
    return launcher.communicate(timeout=400)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_rank_costs_a_restart(tmp_path: Path) -> None:
    """Of a run, and of a branch of it: they go on with the numbers of those that were left alone."""
    given = [*SMALL, "precision=fp32", "train.steps=16", "checkpoint.every=5", "checkpoint.keep=null"]

    def launch(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-W", "ignore", "-m", "launch.local", "ranks=2", *arguments, f"run.dir={run_dir}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def numbers(run_dir: Path) -> list[tuple[float, ...]]:
        return [(row["step"], row["loss/lm"], row["grad_norm"]) for row in read_metrics(run_dir)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(whole, "-cn", "tiny", *given).communicate(timeout=400)
    launcher = launch(killed, "restarts=1", "-cn", "tiny", *given)
    printed, errors = end_of(launcher, killed, 8)
    assert launcher.returncode == 0, errors
    told("A rank or a node dies under torchrun", errors)
    assert "died without a word" in errors and "Traceback" not in errors
    assert f"Resuming {killed} after step " in printed
    assert numbers(killed) == numbers(whole) and len(numbers(whole)) == 16

    branch = ("command=train.branch", f"checkpoint={whole}/checkpoints/step-00000010", "optimizer.weight_decay=0.3", "checkpoint.every=1")
    launch(tmp_path / "branch", *branch).communicate(timeout=400)
    launcher = launch(tmp_path / "killed branch", "restarts=1", *branch)
    printed, errors = end_of(launcher, tmp_path / "killed branch", 3)
    assert launcher.returncode == 0 and "Resuming" in printed, errors
    assert numbers(tmp_path / "killed branch") == numbers(tmp_path / "branch")
    assert [step for step, *_ in numbers(tmp_path / "branch")] == list(range(11, 17))


def start(run_dir: Path, ranks: int, *overrides: str) -> str:
    """Three steps of a small `tiny` on several ranks; what was printed."""
    length = ("train.steps=3", "optimizer.warmup=1", "optimizer.decay=1", f"run.dir={run_dir}")
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", f"ranks={ranks}", "-cn", "tiny", *SMALL, *length, *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_ranks_train_and_finish(tmp_path: Path) -> None:
    printed = start(tmp_path / "run", 2, "precision=fp32", "parallel.tensor=2")
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert "2 ranks on cpu: tensor 2 + sequence" in printed
    assert printed.count("Finished 3 steps") == 1  # one rank speaks


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_signal_to_the_launcher_stops_its_ranks_in_order(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = [
        sys.executable,
        "-m",
        "launch.local",
        "ranks=2",
        "-cn",
        "tiny",
        *SMALL,
        "train.steps=100000",
        f"run.dir={run_dir}",
        "precision=fp32",
    ]
    launcher = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = run_dir / "metrics.jsonl"
    while launcher.poll() is None and not (
        metrics.exists() and metrics.stat().st_size
    ):  # a run stopped before its first step has nothing to save
        time.sleep(0.2)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == STOPPED, errors
    assert "Traceback" not in errors
    assert list(run_dir.glob("checkpoints/step-*/manifest.json"))


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
