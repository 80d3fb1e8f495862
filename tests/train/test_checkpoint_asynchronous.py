"""Checkpoints written beside the training: the same bits as those written while it waits, however late the writer is, and never half of one."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import groups
from tests.runbook import told
from tests.train.numbers import numbers_in
from tests.train.recipes import recipe
from tests.train.test_checkpointer import Engine, Model, train
from train import loop
from train.checkpoint import checkpointer as room
from train.checkpoint import staging
from train.checkpoint.background import Task
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.reader import Checkpoint, latest
from train.checkpoint.retention import Retention
from train.observe.metrics import decode_lines, read_metrics


class Late(Task[Any]):
    """Writes at the last moment: when somebody waits for it, which is after training has gone on for as long as it may."""

    def __init__(self, function: Callable[[], Any], name: str):
        self._asked = threading.Event()
        super().__init__(lambda: (self._asked.wait(), function())[1], name)

    def wait(self, seconds: float) -> bool:
        if seconds:
            self._asked.set()
        return super().wait(seconds)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(function: Callable[[], Any], name: str) -> Task[Any]:
        return Late(function, name) if name == "checkpoint" else Task(function, name)

    monkeypatch.setattr(room, "Task", choose)


def steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def differing(ours: Path, theirs: Path) -> list[str]:
    """What two checkpoints do not have in common, bit for bit."""
    a, b = Checkpoint(ours), Checkpoint(theirs)
    a.verify()
    assert a.manifest.tensors.keys() == b.manifest.tensors.keys() and len(a.manifest.tensors) > 5
    different = [name for name in a.names() if not torch.equal(a.read_full(name), b.read_full(name))]
    different += ["step"] if (a.step, a.tokens) != (b.step, b.tokens) else []
    return different + (["state"] if untimed(a.state) != untimed(b.state) else [])


def untimed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without the seconds since the start, and those in the lines that the metrics file remembers."""
    observers = dict(state.get("observers", {}))
    if file := observers.get("MetricsFile"):
        observers["MetricsFile"] = [numbers_in(line) for line in decode_lines("".join(file["lines"]).encode())]
    return {key: value for key, value in state.items() if key != "elapsed"} | {"observers": observers}


def test_every_save_holds_the_step_it_was_begun_at(tmp_path: Path, late: None) -> None:
    torch.manual_seed(1)
    model = Model(torch.bfloat16)
    engine = Engine(model)
    at_once = Checkpointer(tmp_path / "at once", engine, [model])
    heard: list[int] = []
    beside = Checkpointer(tmp_path / "beside", engine, [model], asynchronous=True, saved=lambda step, path: heard.append(step))
    for step in (1, 2, 3, 4):
        train(model, engine, range(step - 1, step))
        state: dict[str, Any] = {"observers": {"curve": [step]}}
        at_once.save(step, state, tokens=10 * step)
        beside.save(step, state, tokens=10 * step)
        state["observers"]["curve"].append("later")
        with torch.no_grad():
            for tensor in (*model.parameters(), model.bias, *engine.masters):
                tensor.add_(1.0)  # as if training went on
        beside.poll()
        assert beside.under_way == step and heard == list(range(1, step))
        with torch.no_grad():
            for tensor in (*model.parameters(), model.bias, *engine.masters):
                tensor.sub_(1.0)
    assert steps(tmp_path / "beside")[-1] == "step-00000004.partial"
    beside.close()
    assert heard == [1, 2, 3, 4] and beside.under_way is None
    assert steps(tmp_path / "beside") == steps(tmp_path / "at once")
    for name in steps(tmp_path / "beside"):
        assert differing(tmp_path / "beside" / "checkpoints" / name, tmp_path / "at once" / "checkpoints" / name) == []


GIVEN = ("precision=nvfp4", "train.steps=7", "optimizer.warmup=1", "optimizer.decay=2", "checkpoint.every=2", "checkpoint.keep=null")


def run(rank: int, run_dir: str, asynchronous: str, overrides: tuple[str, ...], size: int, held_back: bool) -> int:
    patch = pytest.MonkeyPatch()
    if held_back:
        patch.setattr(room, "Task", lambda function, name: Late(function, name) if name == "checkpoint" else Task(function, name))
    given = (*GIVEN, *overrides, f"checkpoint.asynchronous={asynchronous}", f"run.dir={run_dir}")
    with patch.context():
        try:
            return loop.run(recipe(*given, world_size=size))
        finally:
            patch.undo()
            groups.shutdown(leave_world=False)


@pytest.mark.parametrize(
    "size, overrides",
    [pytest.param(1, (), marks=pytest.mark.slow), (2, ("parallel.expert=2", "parallel.distributed_optimizer=true"))],
    ids=["1", "2"],
)
def test_a_run_saves_the_same_bits_however_late_its_writer_is(ranks: Any, tmp_path: Path, size: int, overrides: tuple[str, ...]) -> None:
    for way, held_back in (("false", False), ("true", True)):
        assert set(ranks(size)(run, str(tmp_path / way), way, overrides, size, held_back)) == {0}
    expected = [f"step-{step:08d}" for step in (2, 4, 6, 7)]
    assert steps(tmp_path / "true") == steps(tmp_path / "false") == expected
    for name in expected:
        assert differing(tmp_path / "true" / "checkpoints" / name, tmp_path / "false" / "checkpoints" / name) == []
    log = (tmp_path / "true" / "log.txt").read_text()
    assert log.index("step 3/7") < log.index("step-00000002") < log.index("step 5/7")  # told of when it is complete, and not before


def test_an_error_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: None, alone: None
) -> None:
    from train import training

    step = training.train_step

    def failing(run: Any, number: int, clock: Any) -> dict[str, float]:
        if number == 4:
            raise ZeroDivisionError("a defect")
        return step(run, number, clock)

    monkeypatch.setattr(training, "train_step", failing)
    with pytest.raises(ZeroDivisionError):
        loop.run(recipe(*GIVEN, "checkpoint.asynchronous=true", f"run.dir={tmp_path}"))
    assert steps(tmp_path) == ["step-00000002"]
    monkeypatch.undo()
    assert loop.run(recipe(*GIVEN, "checkpoint.asynchronous=true", f"run.dir={tmp_path}")) == 0
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_rewind_while_a_checkpoint_is_written_reads_that_one(tmp_path: Path, late: None) -> None:
    model = Model()
    engine = Engine(model)
    beside = Checkpointer(tmp_path, engine, [model], asynchronous=True, retention=Retention(1))
    train(model, engine, range(2))
    beside.save(2, {})
    expected = model.fused.detach().clone()
    train(model, engine, range(2, 4))
    assert beside.under_way == 2
    checkpoint = beside.load_newest()
    assert checkpoint is not None and checkpoint.step == 2 and beside.under_way is None
    assert torch.equal(model.fused, expected) and steps(tmp_path) == ["step-00000002"]


def test_a_rewind_names_the_damaged_one_it_passes_over(tmp_path: Path) -> None:
    model = Model()
    engine = Engine(model)
    beside = Checkpointer(tmp_path, engine, [model], asynchronous=True, report=lambda line: None)
    for step in (1, 2, 3):
        beside.save(step, {})
    beside.close()
    (tmp_path / "checkpoints" / "step-00000002" / "rank-00000-000.safetensors").unlink()
    checkpoint = beside.go_back(2)
    assert checkpoint is not None and checkpoint.step == 1
    (line,) = beside.passed_over
    assert "step-00000002: its file rank-00000-000.safetensors is missing" in line


def test_one_that_is_abandoned_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    begun, go_on = threading.Event(), threading.Event()

    def slow(path: Path, entries: Any, check: Callable[[], None]) -> None:
        begun.set()
        go_on.wait()
        check()

    beside = Checkpointer(tmp_path, Engine(model), [model], asynchronous=True)
    beside.save(1, {})
    beside.close()
    monkeypatch.setattr("train.checkpoint.writer.write_safetensors", slow)
    beside.save(2, {})
    assert begun.wait(10) and steps(tmp_path) == ["step-00000001", "step-00000002.partial"]
    threading.Timer(0.1, go_on.set).start()
    beside.abandon()
    assert steps(tmp_path) == ["step-00000001"] and beside.under_way is None


def test_auto_copies_only_where_memory_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    said: list[str] = []
    for free, copied in ((1 << 40, True), (100, False)):
        monkeypatch.setattr(staging, "free_memory", lambda free=free: free)
        saving = Checkpointer(tmp_path / str(free), Engine(model), [model], asynchronous="auto", report=said.append)
        saving.save(1, {})
        assert (saving.under_way is not None) == copied
        saving.close()
        assert latest(tmp_path / str(free) / "checkpoints") is not None
    (line,) = said
    told("Training waits for checkpoints although", line)


def other_tensors(rank: int, directory: str) -> list[str]:
    """Saves with a writer that fails in a thread of one rank: by its disk, and by a defect."""
    model = Model()
    troubles: list[str] = []
    beside = Checkpointer(directory, Engine(model), [model], asynchronous=True, failed=lambda step, trouble: troubles.append(trouble))
    for error in (OSError(28, "No space left on device", "rank-00001-000.safetensors"), None, KeyError("a defect")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1 and error is not None:
                patch.setattr("train.checkpoint.writer.Draft.write", lambda draft, tensors, error=error: (_ for _ in ()).throw(error))
            beside.save(len(troubles) + 1, {})
            with contextlib.suppress(KeyError, CheckpointError) if isinstance(error, KeyError) else contextlib.nullcontext():
                beside.close()
                troubles.append("complete")
    return troubles


def test_what_one_thread_cannot_write_no_rank_commits(ranks: Any, tmp_path: Path) -> None:
    first, second = ranks(2)(other_tensors, str(tmp_path))
    assert first == second and first[1:] == ["complete", "complete"]
    assert "No space left on device: rank-00001-000.safetensors (rank 1)" in first[0]
    assert steps(tmp_path) == ["step-00000003"]


def test_copies_are_the_values_in_as_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BLOCK", 1024)
    torch.manual_seed(0)
    tensors = [
        torch.randn(3, 5).t(),
        torch.tensor(7),
        torch.tensor([True, False, True]),
        torch.randn(100).bfloat16(),
        torch.randn(30, 20),  # larger than a block
        torch.randn(17, dtype=torch.float64),
    ]
    area = staging.Staging()
    first = area.copy(tensors)
    where = [copy.data_ptr() for copy in first]
    assert all(torch.equal(copy, tensor) and copy.is_contiguous() for copy, tensor in zip(first, tensors, strict=True))
    assert not {copy.data_ptr() for copy in first} & {tensor.data_ptr() for tensor in tensors}
    for tensor in tensors:
        tensor.copy_(tensor.logical_not() if tensor.dtype == torch.bool else tensor + 1)
    assert not any(torch.equal(copy, tensor) for copy, tensor in zip(first, tensors, strict=True))
    second = area.copy(tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(second, tensors, strict=True))
    assert [copy.data_ptr() for copy in second] == where  # the same memory again
