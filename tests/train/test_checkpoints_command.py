"""python -m train.checkpoints: what it lists, what it deletes and what it leaves alone, and the mean of checkpoints against one in fp64."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.runbook import told
from tests.train.recipes import recipe
from train import evaluate
from train.checkpoint.boxes import Box
from train.checkpoint.inventory import take
from train.checkpoint.merge import merge
from train.checkpoint.parts import Part
from train.checkpoint.reader import Checkpoint, open_checkpoint
from train.checkpoint.writer import save
from train.checkpoints import main
from train.lock import RunLock
from train.loop import run
from train.observe.metrics import read_metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with a checkpoint and an evaluation after every other, and a milestone at 4."""
    path = tmp_path_factory.mktemp("runs") / "small"
    saved = ("checkpoint.every=2steps", "checkpoint.keep=null", "checkpoint.milestones=[4steps]")
    asked = ("train.steps=6", "train.eval_every=2", "optimizer.warmup=1", "optimizer.decay=2", *saved)
    assert run(recipe(f"run.dir={path}", *asked, "precision=fp32")) == 0
    return path


@pytest.fixture
def small(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "small"))


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*[0-9]"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_lists_what_there_is(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(small)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    losses = {entry["step"]: entry["eval/loss"] for entry in read_metrics(small) if "eval/loss" in entry}
    assert rows.keys() == {"step", "2", "4", "6"}
    for step in (2, 4, 6):
        assert f"{losses[step]:.4f}" in rows[str(step)] and f"{step * 8 * 64:,}" in rows[str(step)] and "complete" in rows[str(step)]
    assert "4 steps" in rows["4"] and "4 steps" not in rows["6"]


def test_verifies(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(small / "checkpoints/step-00000004/rank-00000-000.safetensors")
    (small / "checkpoints/step-00000002/manifest.json").unlink()
    (small / "checkpoints/step-00000008.partial").mkdir()
    assert main([str(small), "verify=true"]) == 1
    out = capsys.readouterr().out
    assert "its file rank-00000-000.safetensors does not match its checksum" in out
    assert "it has no manifest.json" in out and "step-00000008.partial is being written" in out
    assert [entry.problem is None for entry in take(small / "checkpoints", verify=True)] == [True, False, False]
    assert take(small / "checkpoints", verify=True)[1].milestone == "4 steps"


@pytest.mark.parametrize(
    ("asked", "left"),
    [(["keep=1"], [4, 6]), (["keep=2"], [4, 6]), (["keep=3"], [2, 4, 6]), (["keep=1", "keep_every=2"], [2, 4, 6])],
)
def test_prunes_by_the_rule_of_the_run(small: Path, asked: list[str], left: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(small), "prune=true", *asked, "dry_run=true"]) == 0
    told = capsys.readouterr().out
    assert steps(small) == [2, 4, 6], "a dry run deletes nothing"
    assert main([str(small), "prune=true", *asked]) == 0
    assert steps(small) == left
    assert ("would delete" in told) == (left != [2, 4, 6]) and not (small / "lock").exists()
    assert (small / "recipe.yaml").exists() and (small / "metrics.jsonl").exists()


def test_pruning_spares_the_newest_valid_one(small: Path) -> None:
    for step in (4, 6):
        flip(small / f"checkpoints/step-{step:08d}/rank-00000-000.safetensors")
    assert main([str(small), "prune=true", "keep=1"]) == 0
    assert steps(small) == [2, 4, 6], "2 is the only one a run can go on from"


def test_pruning_waits_for_nobodys_run(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(small)
    lock.acquire()
    try:
        assert main([str(small), "prune=true", "keep=1"]) == 2
        told("See, verify and delete checkpoints", capsys.readouterr().err, "is in use by process")
        assert steps(small) == [2, 4, 6]
        assert main([str(small), "prune=true", "keep=1", "dry_run=true"]) == 0
    finally:
        lock.release()


def test_nothing_leads_outside(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(small / "checkpoints/step-00000002", elsewhere / "step-00000002")
    (small / "checkpoints/step-00000002").symlink_to(elsewhere / "step-00000002")
    (small / "checkpoints/step-00000001").mkdir()
    (small / "checkpoints/step-00000001/inner").symlink_to(elsewhere)
    assert main([str(small), "prune=true", "keep=1"]) == 0
    assert (elsewhere / "step-00000002/manifest.json").exists() and steps(small) == [2, 4, 6]
    assert main([str(small)]) == 0
    assert f"a link to {elsewhere / 'step-00000002'}, left alone" in capsys.readouterr().out

    shutil.move(small / "checkpoints", elsewhere / "checkpoints")
    (small / "checkpoints").symlink_to(elsewhere / "checkpoints")
    assert main([str(small), "prune=true", "keep=1"]) == 2
    assert f"leads to {elsewhere / 'checkpoints'}, outside the run's directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the run is missing"),
        (["runs/nowhere"], "runs/nowhere holds no checkpoints"),
        (["{run}", "prune=true"], "keep=... is missing"),
        (["{run}", "prune=true", "keep=0"], "keep=0 is no whole number of at least 1"),
        (["{run}", "keep=3"], "keep=3 says nothing about a list"),
        (["{run}", "sort=true"], "'sort=true' is unknown here"),
        (["{run}", "merge=[2,4]"], "to=... is missing"),
        (["{run}", "merge=[2]", "to={run}/x"], "is no list of at least two"),
        (["{run}", "merge=[2,3]", "to={run}/x"], "merge=3 names no checkpoint"),
        (["{run}", "merge=[4,4steps]", "to={run}/x"], "names step 4 twice"),
        (["{run}", "merge=[2,4]", "weights=[1]", "to={run}/x"], "must hold one number for each of the 2"),
        (["{run}", "merge=[2,4]", "weights=[1,-1]", "to={run}/x"], "must be numbers above 0"),
        (["{run}", "merge=[2,4]", "to={run}"], "holds checkpoints already"),
    ],
)
def test_refuses_in_one_sentence(trained: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.replace("{run}", str(trained)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error


def test_merges_and_evaluates(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "merged"
    assert main([str(small), "merge=[2,4steps,6]", "weights=[1,1,2]", f"to={to}"]) == 0
    out = capsys.readouterr().out
    losses = {entry["step"]: entry["eval/loss"] for entry in read_metrics(small) if "eval/loss" in entry}
    rows = {line.strip().split("  ")[0]: line for line in out.splitlines() if line.startswith("  ")}
    for step in (2, 4, 6):
        assert f"{losses[step]:.4f}" in rows[f"step {step}"], "the parts are measured as the run measured them"
    parts = [open_checkpoint(small / f"checkpoints/step-{step:08d}") for step in (2, 4, 6)]
    merged = open_checkpoint(to)
    names = {name for name in parts[0].names() if name.startswith("model/")}
    assert set(merged.names()) == names and any("e_score_correction_bias" in name for name in names)
    for name in names:
        a, b, c = (part.read_full(name).numpy().astype("float64") for part in parts)
        assert torch.equal(merged.read_full(name), torch.from_numpy((a + b + 2 * c) / 4).to(merged.stored(name).dtype)), name
    assert merged.step == 6 and merged.state["merged_from"][2]["weight"] == 2
    said = rows["merged"].split()[1]
    assert evaluate.main([f"checkpoint={to}"]) == 0
    assert f"validation loss {said} nats" in capsys.readouterr().out
    further = tmp_path / "further"
    assert (
        run(recipe(f"run.dir={further}", "train.steps=13", "run.stop_after=1steps", f"checkpoint.initialize_from={to}", "precision=fp32"))
        == 0
    )
    assert (to / "tokenizer/facts.json").read_bytes() == (small / "tokenizer/facts.json").read_bytes()


def written(directory: Path, step: int, tensors: Sequence[tuple[str, torch.Tensor]]) -> Checkpoint:
    parts = [Part(name, tuple(t.shape), Box((0,) * t.dim(), tuple(t.shape)), t) for name, t in tensors]
    return Checkpoint(save(directory, step, parts, {}))


def test_masters_are_averaged_and_rounded_once(tmp_path: Path) -> None:
    """1 + 2^-9 in fp32 is 1 in bf16, so the mean of bf16 weights would lose what their masters hold."""
    a = torch.tensor([[1.0, 1 + 2**-9], [3.0, 5.0]])
    b = torch.tensor([[1 + 2**-6, 1 + 2**-7 + 2**-9], [7.0, -5.0]])
    checkpoints = [
        written(tmp_path / "run", step, [("model/w", w.bfloat16()), ("master/w", w), ("model/count", torch.tensor(7)), ("exp_avg/w", w)])
        for step, w in ((1, a), (2, b))
    ]
    merged = Checkpoint(merge(checkpoints, [1.0, 1.0], tmp_path / "merged", shard_bytes=4))
    assert merged.names() == ["model/count", "model/w"] and merged.read_full("model/count") == 7
    assert len(merged.manifest.files) > 1, "larger tensors are cut"
    assert torch.equal(merged.read_full("model/w"), ((a.double() + b.double()) / 2).bfloat16())
    assert not torch.equal(merged.read_full("model/w"), (a.bfloat16().double() + b.bfloat16().double()).div(2).bfloat16())


def test_what_has_no_mean_is_refused(tmp_path: Path) -> None:
    whole = [written(tmp_path / "run", step, [("model/count", torch.tensor(step))]) for step in (1, 2)]
    with pytest.raises(ValueError, match="whole numbers that differ"):
        merge(whole, [1.0, 1.0], tmp_path / "merged")
    assert not os.listdir(tmp_path / "merged"), "nothing is left"
    other = written(tmp_path / "other", 1, [("model/w", torch.zeros(3))])
    with pytest.raises(ValueError, match="not of one model: only one of them holds model/count"):
        merge([whole[0], other], [1.0, 1.0], tmp_path / "merged")
