"""Disks that fail while a run saves, and damage found when it starts again: training goes on, and says so."""

import json
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runbook import told
from tests.train.recipes import recipe
from tests.train.test_failure import Job, errors, jobs
from train import loop, training
from train.checkpoint.reader import Checkpoint, open_checkpoint
from train.observe.metrics import read_metrics

__all__ = ["jobs"]  # a fixture

SMALL_FILES = 60_000  # bytes: room for metrics and logs, and for no file of a checkpoint
GIVEN = ("precision=fp32", "train.steps=8", "optimizer.warmup=1", "optimizer.decay=2", "checkpoint.every=2", "checkpoint.keep=2")
TWELVE = (*GIVEN, "train.steps=12", "checkpoint.every=4")


def limit(process: psutil.Process, size: int | None) -> None:
    """As if the disk had no room for a larger file: writing one fails with EFBIG."""
    process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY if size is None else size, resource.RLIM_INFINITY))


def before_steps(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], object]]) -> None:
    step = training.train_step

    def acting(run: Any, number: int, *arguments: Any) -> dict[str, float]:
        actions.get(number + 1, lambda: None)()
        return step(run, number, *arguments)

    monkeypatch.setattr(training, "train_step", acting)


def until_written() -> None:
    """So that what is done to the disk next does not meet the save before."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def unlimited() -> Iterator[None]:
    yield
    limit(psutil.Process(), None)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_costs_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None, unlimited: None, asynchronous: str, capsys: Any
) -> None:
    me = psutil.Process()
    before_steps(monkeypatch, {5: until_written, 7: lambda: limit(me, SMALL_FILES), 10: lambda: limit(me, None)})
    assert loop.run(recipe(*TWELVE, f"checkpoint.asynchronous={asynchronous}", f"run.dir={tmp_path}")) == 0
    (incident,) = incidents(tmp_path)
    assert (incident["kind"], incident["severe"]) == ("checkpoint", True)
    assert incident["text"] == (
        f"cannot write checkpoint {tmp_path}/checkpoints/step-00000008: File too large; nothing that was written before is lost, the newest "
        "checkpoint is that of step 4"
    )
    assert f"ALERT (checkpoint): {incident['text']}" in capsys.readouterr().out
    failures = {entry["step"]: entry.get("checkpoint/failures", 0) for entry in read_metrics(tmp_path)}
    assert failures[8] == 0 and failures[11] == failures[12] == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000012"]
    assert open_checkpoint(tmp_path).state["failed_saves"] == 1


@pytest.mark.slow
def test_a_run_does_not_end_well_without_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None, unlimited: None
) -> None:
    before_steps(monkeypatch, {7: until_written, 8: lambda: limit(psutil.Process(), SMALL_FILES)})
    given = recipe(*GIVEN, f"run.dir={tmp_path}")
    assert loop.run(given) == 1
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last.startswith("Failed: the run has ended after step 8, and its last checkpoint could not be written (cannot write checkpoint ")
    assert last.endswith(
        "File too large): put that right, and start the same command again, which goes on from the newest one, that of step 6"
    )
    told("A run was stopped, or reached its end", last.replace("Failed: ", "error: "), "the run has ended")
    assert not (tmp_path / "finished.json").exists() and open_checkpoint(tmp_path).step == 6
    monkeypatch.undo()
    limit(psutil.Process(), None)
    assert loop.run(given) == 0
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, 9)) and open_checkpoint(tmp_path).step == 8


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_one_rank_of_two_has_no_room_and_a_stop_says_that_it_could_not_save(jobs: list[Job], tmp_path: Path) -> None:
    overrides = [
        "evaluation.faulty.step=-1",
        "train.eval_every=0",
        "checkpoint.every=5",
        "checkpoint.asynchronous=true",
        "parallel.expert=2",
    ]
    job = Job(tmp_path / "run", *overrides)
    jobs.append(job)
    checkpoints = tmp_path / "run" / "checkpoints"
    job.until(lambda: (checkpoints / "step-00000005").exists())
    (second,) = [process for process in job.ranks if process.environ()["RANK"] == "1"]
    limit(second, SMALL_FILES)
    job.until(lambda: len(incidents(tmp_path / "run")) >= 2)
    limit(second, None)
    known = len(incidents(tmp_path / "run"))
    newest = max(int(path.name[5:13]) for path in checkpoints.glob("step-????????"))
    job.until(lambda: any(int(path.name[5:13]) > newest for path in checkpoints.glob("step-????????")))
    told("A checkpoint could not be written", incidents(tmp_path / "run")[0]["text"], "(rank 1)")
    assert len(incidents(tmp_path / "run")) <= known + 1 and job.text().count("ALERT (checkpoint)") >= 2
    assert read_metrics(tmp_path / "run")[-1]["checkpoint/failures"] >= 2
    limit(second, SMALL_FILES)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(40) == 1
    (line,) = errors(job.text())
    told("A run was stopped, or reached its end", line, "was stopped by SIGTERM")
    assert open_checkpoint(tmp_path / "run").step >= newest


@pytest.mark.slow
def test_a_disk_that_becomes_full_and_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system of its own for the checkpoints of a run; needs the right to mount one."""
    place = tmp_path / "checkpoints"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    filler = place / "filler"

    def fill() -> None:
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    def remount(how: str) -> Callable[[], object]:
        return lambda: subprocess.check_call(["mount", "-o", f"remount,{how}", str(place)])

    try:
        before_steps(monkeypatch, {5: until_written, 7: fill, 11: filler.unlink, 14: until_written, 15: remount("ro"), 18: remount("rw")})
        given = recipe(*TWELVE, "train.steps=20", "checkpoint.asynchronous=true", f"run.dir={tmp_path}")
        assert loop.run(given) == 0
        texts = [incident["text"] for incident in incidents(tmp_path)]
        assert "step-00000008: No space left on device" in texts[0] and "that of step 4" in texts[0]
        assert "step-00000016: Read-only file system: " in texts[1] and "that of step 12" in texts[1]
        assert len(texts) == 2 and open_checkpoint(tmp_path).step == 20
        told("A checkpoint could not be written", capsys.readouterr().out, "No space left on device", "Read-only file system")
    finally:
        subprocess.run(["umount", str(place)], check=False)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated": ("rank-00000-000.safetensors", truncate, "its file rank-00000-000.safetensors has "),
    "bit-flipped": ("rank-00000-000.safetensors", flip, "its file rank-00000-000.safetensors does not match its checksum"),
    "missing": ("rank-00000-000.safetensors", Path.unlink, "its file rank-00000-000.safetensors is missing"),
    "half a manifest": ("manifest.json", truncate, "its manifest.json cannot be read"),
    "a flipped manifest": ("manifest.json", flip, "its manifest.json "),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained")
    assert loop.run(recipe(*GIVEN, f"run.dir={run_dir}")) == 0
    return run_dir


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    trained: Path, tmp_path: Path, alone: None, capsys: Any, damage: str
) -> None:
    name, harm, words = DAMAGE[damage]
    subprocess.run(["cp", "-r", f"{trained}/.", str(tmp_path)], check=True)
    (tmp_path / "finished.json").unlink()
    newest = tmp_path / "checkpoints" / "step-00000008"
    harm(newest / name)
    assert loop.run(recipe(*GIVEN, f"run.dir={tmp_path}")) == 0
    out = capsys.readouterr().out
    assert f"Skipping checkpoint {newest}: {words}" in out and f"Resuming {tmp_path} after step 6 of 8" in out
    if damage == "bit-flipped":
        told("The newest checkpoint is damaged", out, "does not match its checksum", "Resuming", "ALERT (checkpoint)")
    elif damage == "truncated":
        told("The newest checkpoint is damaged", out, "bytes instead of")
    elif damage == "missing":
        told("The newest checkpoint is damaged", out, "is missing")
    elif damage == "half a manifest":
        told("The newest checkpoint is damaged", out, "cannot be read")
    elif "does not match its own checksum" in out:
        told("The newest checkpoint is damaged", out, "its own checksum")
    (incident,) = incidents(tmp_path)
    assert (incident["kind"], incident["step"], incident["severe"]) == ("checkpoint", 6, True)
    assert words in incident["text"] and f"ALERT (checkpoint): {incident['text']}" in out
    ours, theirs = Checkpoint(newest), Checkpoint(trained / "checkpoints" / "step-00000008")
    assert {file.sha256 for file in ours.manifest.files.values()} == {file.sha256 for file in theirs.manifest.files.values()}
