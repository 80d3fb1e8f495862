"""A writer killed before each of its file-system operations in turn: nothing finished is lost, and what it left behind is in nobody's way."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_checkpointer import Engine, Model
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.retention import Retention

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def checkpointer(run_dir: Path, retention: Retention | None = None, asynchronous: bool = False) -> Checkpointer:
    model = Model()
    return Checkpointer(run_dir, Engine(model), [model], retention=retention, asynchronous=asynchronous, report=lambda line: None)


def first(run_dir: Path) -> None:
    pass


def older(run_dir: Path) -> None:
    for step in (1, 2):
        checkpointer(run_dir).save(step, {"text": "old"})


def same_step(run_dir: Path) -> None:
    for step in (1, 2, 3):
        checkpointer(run_dir).save(step, {"text": "old"})


def damaged(run_dir: Path) -> None:
    same_step(run_dir)
    (file,) = (run_dir / "checkpoints" / "step-00000003").glob("*.safetensors")
    os.truncate(file, 100)


def replaced(run_dir: Path) -> None:
    """As between the two renames of a replacement, with what an earlier one left."""
    same_step(run_dir)
    (run_dir / "checkpoints" / "step-00000003").rename(run_dir / "checkpoints" / "step-00000003.old")
    shutil.copytree(run_dir / "checkpoints" / "step-00000002", run_dir / "checkpoints" / "step-00000003.old.partial")


def save_new(run_dir: Path, asynchronous: bool) -> None:
    saving = checkpointer(run_dir, Retention(1), asynchronous)
    saving.save(3, {"text": "new"})
    saving.close()


def die_before(operation: int, action: Callable[[], Any]) -> bool:
    """Runs `action` in a child that is killed before its file-system operation number `operation`; whether there were that many."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in OPERATIONS:
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(count)
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


SCENES: dict[str, tuple[Callable[[Path], None], set[tuple[int, str] | None]]] = {
    "the first checkpoint": (first, {None, (3, "new")}),
    "older ones go": (older, {(2, "old"), (3, "new")}),
    "one of the same step is replaced": (same_step, {(3, "old"), (3, "new")}),
    "a damaged one of the same step is replaced": (damaged, {(2, "old"), (3, "new")}),
    "a replacement that was killed before": (replaced, {(3, "old"), (3, "new")}),
}


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True], ids=["at once", "beside the training"])
@pytest.mark.parametrize("scene", SCENES)
def test_killed_before_each_operation_of_a_save(tmp_path: Path, scene: str, asynchronous: bool) -> None:
    prepare, expected = SCENES[scene]
    prepare(tmp_path / "before")
    found: set[tuple[int, str] | None] = set()
    operation = 0
    while True:
        run_dir = tmp_path / str(operation)
        if (tmp_path / "before").exists():
            shutil.copytree(tmp_path / "before", run_dir)
        killed = die_before(operation, partial(save_new, run_dir, asynchronous))
        for file in run_dir.glob("checkpoints/*.partial/*"):  # and the machine with it, before all was on the disk
            os.truncate(file, file.stat().st_size // 2)
        # Cleaning up is cut short as well, each time elsewhere.
        die_before(operation % 12, checkpointer(run_dir).load_newest)
        checkpoint = checkpointer(run_dir).load_newest()
        outcome = None if checkpoint is None else (checkpoint.step, str(checkpoint.state["text"]))
        assert outcome in expected, f"after operation {operation}"
        found.add(outcome)
        assert not [path.name for path in run_dir.glob("checkpoints/*") if path.name.endswith(".partial")]
        checkpointer(run_dir, retention=Retention(1)).save(4, {"text": "next"})
        assert [path.name for path in run_dir.glob("checkpoints/*")] == ["step-00000004"]
        shutil.rmtree(run_dir)
        if not killed:
            break
        operation += 1
    assert operation > 5 and found == expected


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    checkpointer(tmp_path).save(1, {})
    (tmp_path / "checkpoints" / "step-00000002.partial").mkdir()
    (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"holds checkpoints, but none of them is valid \(see the reasons above\): repair one, or choose"
    ):
        checkpointer(tmp_path).load_newest()
    assert (tmp_path / "checkpoints" / "step-00000001").exists()  # whoever can repair it may
