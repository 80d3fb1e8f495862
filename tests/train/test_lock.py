"""One owner of a directory at a time, whoever crashed before."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from train import lock
from train.lock import Locked, RunLock


def elsewhere(directory: Path, beat: int) -> None:
    """What a run on another machine keeps in the file."""
    holder = {"host": "elsewhere", "boot": "x", "process": 7, "process_started": 1.0, "since": "2026-01-02 03:04:05+00:00", "beat": beat}
    (directory / "lock").write_text(json.dumps(holder))


def test_the_second_is_refused_and_release_leaves_nothing(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "a" / "run")
    first.acquire()
    with pytest.raises(Locked, match=r"run.dir=.* is in use by process \d+ on host .* since 20.*: wait until that run ends, stop it, or"):
        RunLock(tmp_path / "a" / "run").acquire()
    first.release()
    first.release()
    assert not list(tmp_path.iterdir())
    second = RunLock(tmp_path / "a" / "run")
    second.acquire()
    (tmp_path / "a" / "run" / "metrics.jsonl").write_text("")
    second.release()
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["metrics.jsonl"]


def test_a_dead_run_of_another_machine_is_told_from_a_living_one(tmp_path: Path) -> None:
    said: list[str] = []
    elsewhere(tmp_path, 41)
    ours = RunLock(tmp_path, said.append, dead_seconds=0.4)
    ours.acquire()  # nothing moved
    assert "host elsewhere" in said[0]
    ours.release()
    elsewhere(tmp_path, 1)
    alive = threading.Event()

    def beats() -> None:
        for beat in range(2, 200):
            if alive.wait(0.1):
                return
            elsewhere(tmp_path, beat)

    thread = threading.Thread(target=beats)
    thread.start()
    try:
        with pytest.raises(Locked, match=r"process 7 on host elsewhere since 2026-01-02"):
            RunLock(tmp_path, said.append, dead_seconds=2.0).acquire()
    finally:
        alive.set()
        thread.join()


def test_a_file_system_without_locks_knows_living_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    first = RunLock(tmp_path)
    first.acquire()
    holder = json.loads((tmp_path / "lock").read_text())
    with pytest.raises(Locked, match=rf"process {holder['process']} on"):
        RunLock(tmp_path).acquire()
    first.release()
    for gone in ({"process_started": holder["process_started"] - 100}, {"process": 2**22 + 1}, {"boot": "before"}):
        (tmp_path / "lock").write_text(json.dumps({**holder, **gone}))
        begin = time.monotonic()
        second = RunLock(tmp_path)
        second.acquire()
        second.release()
        assert time.monotonic() - begin < 2


def test_the_holder_counts(tmp_path: Path) -> None:
    ours = RunLock(tmp_path, beat_seconds=0.02)
    ours.acquire()
    deadline = time.monotonic() + 5
    while json.loads((tmp_path / "lock").read_text() or "{}").get("beat", 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ours.release()
