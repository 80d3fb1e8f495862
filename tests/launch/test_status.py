"""launch.status and launch.logs on run directories as runs leave them, and on what Slurm says of their jobs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import logs
from launch.jobs import current, note, states
from launch.status import main, status

SHOWN = (
    "JobId=7 JobName=a JobState={state} Reason={reason} Restarts=2 RunTime=00:05:00 TimeLimit=01:00:00 NodeList=n[0-1] "
    "StdOut=/a b/JobState=RUNNING.log EndTime=2026-01-01T00:00:00"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "recipe.yaml").write_text("train: {steps: 480, tokens: null, global_batch_size: 8, sequence_length: 64}\n")
    lines = [{"step": step, "loss/lm": 2.5, "step_seconds": 2.0, "tokens_per_second": 256.0} for step in range(1, 101)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, complete in (("step-00000050", True), ("step-00000090", True), ("step-00000100", False), ("step-00000095.old", True)):
        (directory / "checkpoints" / name).mkdir(parents=True)
        if complete:
            (directory / "checkpoints" / name / "manifest.json").write_text("{}")
    return directory


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name that prints what is written here."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "scontrol").write_text(f"#!/bin/sh\ncat {tmp_path}/shown\n")
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/bin:/usr/bin")
    return tmp_path / "shown"


def told(run: Path) -> dict[str, str]:
    return dict(status(run, time.time()))


def test_a_run_without_a_scheduler(run: Path) -> None:
    found = told(run)
    assert found["job"] == "none" and found["step"].startswith("100 of 480, logged ")
    assert found["speed"] == "2 s a step, 256 tokens/s, 12m 40s left" and found["loss"] == "2.5000"
    assert found["checkpoint"].startswith("step-00000090, ") and found["last alert"] == "none"  # the newest is not complete
    (run / "incidents.jsonl").write_text('{"time": "T", "step": 57, "kind": "spike", "severe": false, "text": "it rose"}\n')
    (run / "lock").write_text(json.dumps({"process": 12, "host": "a", "since": "now"}))
    found = told(run)
    assert "goodput" not in found
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "goodput/percent": 87.25}\n')
    assert told(run)["goodput"] == "87.2%" and told(run)["speed"] == "unknown"
    assert found["last alert"] == "step 57 (spike, T): it rose" and found["job"] == "process 12 on host a"


def test_a_job_of_slurm(run: Path, scontrol: Path) -> None:
    note(run, "7", run / "slurm.sh", ["-cn", "tiny"])
    scontrol.write_text(SHOWN.format(state="RUNNING", reason="None"))
    assert told(run)["job"] == "7 RUNNING for 00:05:00 of 01:00:00 on n[0-1] after 2 restarts"
    scontrol.write_text(SHOWN.format(state="PENDING", reason="BeginTime"))
    assert told(run)["job"] == "7 PENDING (BeginTime) after 2 restarts"
    scontrol.write_text("")
    assert told(run)["job"] == "7 is over: Slurm has forgotten it"


def test_a_chain_shows_the_job_that_runs(scontrol: Path) -> None:
    line = "JobId={} ArrayJobId=9 ArrayTaskId={} JobName=a JobState={} Reason=None EndTime={}\n"
    parts = [("11", "1", "FAILED", "2026-01-01T01"), ("12", "2", "RUNNING", "2026-01-01T03"), ("9", "3-5%1", "PENDING", "Unknown")]
    scontrol.write_text("".join(line.format(*part) for part in parts))
    state = current(states("9"))
    assert state is not None and (state.job, state.name) == ("9_2", "RUNNING")
    scontrol.write_text("".join(line.format(*part) for part in [parts[0], ("12", "2", "COMPLETED", "2026-01-01T03")]))
    state = current(states("9"))
    assert state is not None and (state.job, state.name) == ("9_2", "COMPLETED")


def test_mistakes_are_one_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["runs/none"]) == 2
    (run / "jobs.jsonl").write_text("{")
    assert main([str(run)]) == 2
    for arguments in ([], [str(run)], [str(run), "rank=x"], [str(run), "ranks=1"]):
        assert logs.main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 7 and all(line.startswith("error: ") for line in errors), errors


def test_logs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "logs").mkdir()
    assert logs.main([str(run), "rank=1"]) == 2
    assert "no rank has started yet" in capsys.readouterr().err
    (run / "logs/rank-00003.log").write_text("".join(f"line {number}\n" for number in range(50)))
    (run / "logs/slurm-7.log").write_text("srun: error\n")
    assert logs.main([str(run), "rank=3", "lines=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"==> {run}/logs/rank-00003.log <==\nline 48\nline 49\n") and "srun: error" in printed
    assert logs.main([str(run), "rank=4"]) == 2
    assert "there are ranks 0 to 3" in capsys.readouterr().err


def test_following(run: Path) -> None:
    (run / "logs").mkdir()
    log = run / "logs/rank-00000.log"
    log.write_text("before\n")
    root = Path(__file__).resolve().parents[2]
    line = [sys.executable, "-m", "launch.logs", str(run), "follow=true"]
    with subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as reader:
        assert reader.stdout is not None
        assert [reader.stdout.readline() for _ in range(2)][1] == "before\n"
        with log.open("a") as file:
            file.write("after\n")
        assert reader.stdout.readline() == "after\n"
        reader.terminate()
