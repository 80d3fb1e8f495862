"""The torchrun starter."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import command, main, split
from tests.train.recipes import SMALL
from train.observe.metrics import read_metrics
from train.signals import STOPPED


def test_command() -> None:
    ranks, rest = split(["ranks=3", "-cn", "tiny", "a=b"])
    assert (ranks, rest) == (3, ["-cn", "tiny", "a=b"])
    line = command(ranks, rest)
    assert line[:3] == ["--standalone", "--nproc-per-node", "3"] and line[4:] == ["-m", "train", "-cn", "tiny", "a=b"]
    assert line[3].startswith("--signals-to-handle=") and "SIGUSR1" in line[3]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["ranks=3", "-cn", "tiny"], "train.global_batch_size=16 is not a multiple of the 3 data-parallel ranks"),
        (["ranks=2", "-cn", "tiny", "parallel.tensor=4"], "parallel.tensor=4 x parallel.pipeline=1 = 4 does not divide the 2 ranks"),
        (["ranks=2", "-cn", "tiny", "train.stepz=3"], "did you mean train.steps?"),
        (["ranks=2", "-m", "run.seed=1,2"], "-m is a sweep"),
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
        cwd=Path(__file__).resolve().parents[2],
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
    run_dir, root = tmp_path / "run", Path(__file__).resolve().parents[2]
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
    launcher = subprocess.Popen(line, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while launcher.poll() is None and not (run_dir / "metrics.jsonl").exists():
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
