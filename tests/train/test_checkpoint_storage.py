"""Checkpoints in an object store, against a real server: what lies there, what comes back, and what happens when the store fails."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

from tests.runbook import told
from tests.train.numbers import numbers
from tests.train.recipes import recipe
from tests.train.store import Store, opened_store
from tests.train.test_checkpointer import Engine, Model
from train import evaluate
from train.checkpoint.boxes import Box
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.manifest import StorageError
from train.checkpoint.parts import Part
from train.checkpoint.reader import latest, open_checkpoint
from train.checkpoint.remote import locate, url_problem
from train.checkpoint.retention import Retention
from train.checkpoint.writer import begin, delete_older
from train.checkpoints import main
from train.loop import run
from train.observe.metrics import read_metrics
from train.recipe.reading import RecipeError


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with opened_store() as store:
        yield store


@pytest.fixture
def store(server: Store) -> Iterator[Store]:
    """Empty, and well."""
    server.proxy.delay, server.proxy.room, server.proxy.swallow = 0.0, None, False
    for name in server.names():
        server.remove(name)
    yield server
    server.proxy.delay, server.proxy.room, server.proxy.swallow = 0.0, None, False


def checkpointer(model: Model, url: str = "s3://checkpoints/run", **options: Any) -> Checkpointer:
    return Checkpointer("nowhere", Engine(model), [model], storage=url, **options)


def step_of(name: str) -> int:
    return int(name.split("/")[0][5:])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_and_restores_bit_for_bit(store: Store, asynchronous: bool) -> None:
    model, alerts = Model(), []
    saving = checkpointer(
        model, asynchronous=asynchronous, retention=Retention(keep=2), saved=lambda step, path: alerts.append((step, str(path)))
    )
    for step in (1, 2, 3):
        with torch.no_grad():
            model.fused.add_(step)
        saving.save(step, {"elapsed": 1.5}, tokens=step * 10)
    expected = model.fused.detach().clone()
    saving.close()
    assert alerts[-1] == (3, "s3://checkpoints/run/checkpoints/step-00000003")
    names = store.names("run/checkpoints/")
    assert {step_of(name) for name in names} == {2, 3} and len(names) == 4, names
    other = Model()
    restored = checkpointer(other).load_newest()
    assert restored is not None and restored.step == 3 and restored.tokens == 30 and restored.state["elapsed"] == 1.5
    assert torch.equal(other.fused, expected)


def test_a_step_saved_again_takes_the_place_of_the_first(store: Store) -> None:
    """No object is ever written over: until the second manifest is there, the first checkpoint is whole."""
    model = Model()
    saving = checkpointer(model)
    saving.save(1, {})
    first = store.names("run/checkpoints/step-00000001/")
    with torch.no_grad():
        model.fused.mul_(2)
    store.proxy.room = store.proxy.passed  # plenty for the file, and then
    draft = begin("s3://checkpoints/run/checkpoints", 1, [Part("model/w", (2,), Box((0,), (2,)), torch.ones(2))], {})
    store.proxy.room = None
    draft.write()
    assert open_checkpoint("s3://checkpoints/run").names(), "the first is whole while the second is written"
    saving.save(1, {})
    again = store.names("run/checkpoints/step-00000001/")
    assert len(again) == 2 and set(again) & set(first) == {"manifest.json"}
    other = Model()
    assert checkpointer(other).load_newest() is not None and torch.equal(other.fused, model.fused)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "half a manifest", "no manifest"])
def test_a_damaged_object_is_named_and_the_one_before_is_used(store: Store, damage: str) -> None:
    model = Model()
    lines: list[str] = []
    saving = checkpointer(model)
    saving.save(1, {})
    first = model.fused.detach().clone()
    with torch.no_grad():
        model.fused.add_(1)
    saving.save(2, {})
    prefix = "run/checkpoints/step-00000002/"
    file = next(name for name in store.names(prefix) if name.endswith(".safetensors"))
    content, manifest = store.read(prefix + file), store.read(prefix + "manifest.json")
    if damage == "flipped":
        store.write(prefix + file, content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncated":
        store.write(prefix + file, content[:-1])
    elif damage == "missing":
        store.remove(prefix + file)
    elif damage == "half a manifest":
        store.write(prefix + "manifest.json", manifest[: len(manifest) // 2])
    else:
        store.remove(prefix + "manifest.json")
    other = Model()
    restored = checkpointer(other, report=lines.append).load_newest()
    assert restored is not None and restored.step == 1 and torch.equal(other.fused, first)
    if damage != "no manifest":
        assert len(lines) == 1 and "s3://checkpoints/run/checkpoints/step-00000002" in lines[0]
        assert (file if damage in ("flipped", "truncated", "missing") else "manifest.json") in lines[0]
    if damage == "flipped":
        told("A damaged object in the store", lines[0])


def test_an_outage_in_the_middle_of_an_upload(store: Store) -> None:
    """The save fails, with a sentence; the next one succeeds, and clears away what the first left."""
    model, failed, saved = Model(), [], []
    saving = checkpointer(
        model, asynchronous=True, saved=lambda step, path: saved.append(step), failed=lambda step, why: failed.append((step, why))
    )
    saving.save(1, {})
    saving.wait()
    store.proxy.room = 700  # less than the request that carries the file
    saving.save(2, {})
    saving.wait()
    assert saved == [1] and failed[0][0] == 2 and "cannot write checkpoint s3://checkpoints/run/checkpoints/step-00000002" in failed[0][1]
    assert "a-secret-of-tests-only" not in failed[0][1]
    store.proxy.room = None
    newest = latest("s3://checkpoints/run/checkpoints")
    assert newest is not None and newest.step == 1
    saving.save(3, {})
    saving.close()
    assert saved == [1, 3] and len(failed) == 1
    assert {step_of(name) for name in store.names("run/checkpoints/")} == {1, 3}


def test_an_outage_is_no_reason_to_delete_or_to_go_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A milestone that cannot be read right now stays one, and a run does not go on from an older checkpoint because the newest is out of reach."""
    model = Model()
    saving = checkpointer(model)
    saving.save(1, {}, milestone="first")
    for step in (2, 3):
        saving.save(step, {})
    reading = locate("s3://checkpoints/run").__class__.read_bytes

    def failing(self: Any) -> bytes:
        if bad in str(self):
            raise OSError("the store is down")
        return reading(self)

    monkeypatch.setattr("train.checkpoint.remote.RemotePath.read_bytes", failing)
    bad = "step-00000001"
    with pytest.raises(StorageError, match="the store is down"):
        delete_older("s3://checkpoints/run/checkpoints", 3, Retention(keep=1))
    assert main(["s3://checkpoints/run", "prune=true", "keep=1"]) == 2
    assert {step_of(name) for name in store.names("run/checkpoints/")} == {1, 2, 3}
    bad = "step-00000003"
    with pytest.raises(StorageError, match=r"cannot read checkpoint .*step-00000003.*") as caught:
        checkpointer(model).load_newest()
    told("The object store fails during a run", f"error: {caught.value}", "cannot read checkpoint")


def test_training_does_not_wait_for_a_slow_store(store: Store) -> None:
    model, saved = Model(), []
    saving = checkpointer(model, asynchronous=True, retention=Retention(keep=1), saved=lambda step, path: saved.append(step))
    saving.save(1, {})
    saving.wait()
    store.proxy.delay = 0.5
    begun = time.monotonic()
    saving.save(2, {})
    longest = time.monotonic() - begun
    polls = 0
    while saving.under_way is not None:
        before = time.monotonic()
        saving.poll()
        longest, polls = max(longest, time.monotonic() - before), polls + 1
        time.sleep(0.02)
    assert time.monotonic() - begun > 1.0, "the store was not slow"
    assert longest < 0.4 and polls > 10 and saved == [1, 2]
    store.proxy.delay = 0.0
    saving.close()


def test_a_store_that_never_answers_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.checkpoint.remote.REQUEST_SECONDS", 0.5)
    store.proxy.swallow = True
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"^s3://checkpoints/x/y: no answer within 0\.5 seconds$"):
        (locate("s3://checkpoints/x") / "y").write_bytes(b"1")
    assert time.monotonic() - begun < 5


def test_large_tensors_go_in_parts_and_come_back_by_rows(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.checkpoint.remote.BLOCK", 5 << 20)
    monkeypatch.setattr("train.checkpoint.tensors.BLOCK", 1 << 18)
    value = torch.arange(3 << 20, dtype=torch.float32).view(3 << 10, 1 << 10)
    directory = locate("s3://checkpoints/large/checkpoints")
    draft = begin(directory, 1, [Part("model/w", tuple(value.shape), Box((0, 0), tuple(value.shape)), value)], {})
    draft.commit(draft.write)
    checkpoint = open_checkpoint("s3://checkpoints/large")
    assert torch.equal(checkpoint.read_full("model/w"), value)
    store.proxy.passed = 0
    box = Box((1000, 100), (10, 7))
    some = torch.empty(box.shape)
    checkpoint.load_into([Part("model/w", tuple(value.shape), box, some)])
    assert torch.equal(some, value[box.slices])


SHORT = ("train.steps=6", "optimizer.warmup=1", "optimizer.decay=2", "checkpoint.every=2steps", "train.eval_every=3", "precision=fp32")


@pytest.mark.slow
def test_a_run_goes_on_from_a_store(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit as one that lies on the disk and was never stopped; also in a new directory, where only the store knows of it."""
    url = "checkpoint.storage=s3://checkpoints/runs/small"
    assert run(recipe(f"run.dir={tmp_path / 'whole'}", *SHORT)) == 0
    assert run(recipe(f"run.dir={tmp_path / 'first'}", *SHORT, url, "run.stop_after=3steps")) == 0
    assert not (tmp_path / "first/checkpoints").exists()
    assert run(recipe(f"run.dir={tmp_path / 'first'}", *SHORT, url)) == 0
    assert numbers(tmp_path / "first") == numbers(tmp_path / "whole")

    store.remove("runs/small/checkpoints/step-00000006/manifest.json")
    assert run(recipe(f"run.dir={tmp_path / 'second'}", *SHORT, url)) == 0
    assert numbers(tmp_path / "second") == numbers(tmp_path / "whole")[-len(numbers(tmp_path / "second")) :]
    with pytest.raises(RecipeError, match=r"run\.seed"):
        run(recipe(f"run.dir={tmp_path / 'third'}", *SHORT, url, "run.seed=5"))

    capsys.readouterr()
    assert main([str(tmp_path / "first"), "verify=true"]) == 0 and main(["s3://checkpoints/runs/small"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("s3://checkpoints/runs/small/checkpoints: 2 checkpoints") == 2, listed
    assert evaluate.main(["checkpoint=s3://checkpoints/runs/small"]) == 0
    assert f"validation loss {numbers(tmp_path / 'whole')[-1]['eval/loss']:.4f}" in capsys.readouterr().out
    assert main(["s3://checkpoints/runs/small", "merge=[4,6]", f"to={tmp_path / 'merged'}", "evaluate=false"]) == 0
    assert main(["s3://checkpoints/runs/small", "prune=true", "keep=1"]) == 0
    assert {step_of(name) for name in store.names("runs/small/checkpoints/")} == {6}

    with pytest.raises(RecipeError, match="holds no checkpoint, but s3://checkpoints/runs/small/checkpoints does"):
        run(recipe(f"run.dir={tmp_path / 'first'}", *SHORT, "checkpoint.storage=s3://checkpoints/runs/moved"))
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"a-secret-of-tests-only" not in everything and b"AKIATESTINGTESTING" not in everything


@pytest.mark.slow
def test_a_run_whose_store_fails_goes_on(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the second save on for a while: alerts, no step lost, and the saves after it succeed."""
    from train.observe.base import OBSERVERS, Observer, register_observer

    class Outage(Observer):
        def on_checkpoint(self, step: int, path: Any) -> None:
            store.proxy.room = 0 if step == 1 else store.proxy.room

        def on_alert(self, alert: Any) -> None:
            if "cannot write" in alert.text:
                store.proxy.room = None

    register_observer("outage", lambda config: Outage())
    try:
        given = (*SHORT, "checkpoint.every=1steps", "checkpoint.storage=s3://checkpoints/out", "checkpoint.keep=null")
        assert run(recipe(f"run.dir={tmp_path / 'run'}", *given, "monitor.observers=[outage]")) == 0
    finally:
        del OBSERVERS["outage"]
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    steps = {step_of(name) for name in store.names("out/checkpoints/") if name.endswith("manifest.json")}
    assert {1, 6} <= steps and len(steps) < 6
    incidents = (tmp_path / "run/incidents.jsonl").read_text()
    assert "cannot write checkpoint s3://checkpoints/out/checkpoints/step-" in incidents and '"checkpoint"' in incidents
    assert read_metrics(tmp_path / "run")[-1]["checkpoint/failures"] >= 1
    told("The object store fails during a run", capsys.readouterr().out, "cannot write checkpoint s3", "cannot delete")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("s4://bucket/x", "has the protocol s4, which fsspec does not know"),
        ("gs://bucket/x", "needs a package for gs, which is not installed: pip install gcsfs"),
        ("s3://key:secret@bucket/x", "holds credentials or a query"),
        ("file:///x", "is a directory: give its path without a protocol"),
        ("s3://", "names no bucket"),
    ],
)
def test_urls_that_cannot_be_used_are_refused_with_the_recipe(url: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(f"checkpoint.storage='{url}'")
    assert sentence in str(caught.value) and "checkpoint.storage=" in str(caught.value) and "key:secret" not in str(caught.value)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("train.checkpoint.remote.fsspec.get_filesystem_class", missing)
    assert url_problem("s3://bucket/x") == "needs a package for s3, which is not installed: pip install -c constraints.txt -e '.[s3]'"


@pytest.mark.parametrize("why", ["no such bucket", "nobody listens", "no answer"])
def test_a_store_out_of_reach_is_refused_at_the_start(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr("train.run_directory.STORE_SECONDS", 2)
    url = "s3://nobodys-bucket/x" if why == "no such bucket" else "s3://checkpoints/x"
    if why == "nobody listens":
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store.proxy.swallow = why == "no answer"
    begun = time.monotonic()
    with pytest.raises(RecipeError, match=rf"^checkpoint\.storage={url} cannot be used \(.*\): see that it exists") as caught:
        run(recipe(f"run.dir={tmp_path / 'run'}", *SHORT, f"checkpoint.storage={url}"))
    assert time.monotonic() - begun < 20 and "\n" not in str(caught.value)
    assert ("no answer within 2 seconds" in str(caught.value)) == (why == "no answer")
    said = f"error: {caught.value}"
    if why == "no such bucket":
        told("The object store cannot be reached", said, "does not exist)")
    elif why == "nobody listens":
        told("The object store cannot be reached", said, "Could not connect")
    else:
        told("The object store cannot be reached", said, "no answer")
    assert not (tmp_path / "run").exists(), "nothing was begun"
    s3fs.S3FileSystem.clear_instance_cache()
