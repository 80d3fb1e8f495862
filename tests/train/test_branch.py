"""A branch is its parent's continuation, bit for bit, but for what it overrides."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runbook import told
from tests.train.numbers import numbers
from tests.train.recipes import recipe
from train import loop
from train.branching import branch, branch_recipe, parse
from train.checkpoint.reader import open_checkpoint
from train.lineage import read_parent
from train.observe.metrics import read_metrics

FORK = 12
LENGTH = ("train.steps=20", "checkpoint.every=6steps", "checkpoint.keep=null", "checkpoint.asynchronous=false")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "x"
    assert loop.run(recipe(*LENGTH, f"run.dir={run_dir}", "monitor.wandb=offline")) == 0
    return run_dir


def checkpoint_of(run_dir: Path, step: int = FORK) -> str:
    return f"checkpoint={run_dir}/checkpoints/step-{step:08d}"


def values(run_dir: Path, after: int) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if not key.startswith("eval/")}  # evaluated at other steps
        for entry in numbers(run_dir)
        if entry["step"] > after
    ]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = open_checkpoint(a), open_checkpoint(b)
    assert ours.step == theirs.step and ours.manifest.tensors.keys() == theirs.manifest.tensors.keys()
    for name in ours.manifest.tensors:
        assert torch.equal(ours.read_full(name), theirs.read_full(name)), name


def test_under_the_same_recipe_it_is_the_parents_own_continuation(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert branch([checkpoint_of(parent)]) == 0
    made = parent.with_name(f"x-step-{FORK}-same")
    told("Ask what another precision", capsys.readouterr().out, "branch of runs/x after")
    assert [entry["step"] for entry in read_metrics(made)] == list(range(FORK + 1, 21))
    assert values(made, FORK) == values(parent, FORK)
    assert_same_weights(made, parent)
    noted = read_parent(made)
    assert noted is not None and (noted.run_dir, noted.step, noted.changes) == (str(parent), FORK, {})
    assert noted.wandb_id == (parent / "wandb_id").read_text().strip()
    assert (made / "wandb_id").read_text().strip() != noted.wandb_id


def test_another_precision_stopped_killed_and_continued(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command goes on: before its first checkpoint from the parent again, behind it from its own."""
    where = f"run.dir={tmp_path / 'fp32'}"
    line = [checkpoint_of(parent), "precision=fp32", where]
    assert branch([*line, "run.stop_after=15steps"]) == 0
    told("Ask what another precision", capsys.readouterr().out.replace("-> fp32", "-> bf16"), "nvfp4 -> bf16")
    assert [entry["step"] for entry in read_metrics(tmp_path / "fp32")] == [13, 14, 15]
    assert branch(line) == 0
    whole = tmp_path / "whole"
    assert branch([checkpoint_of(parent), "precision=fp32", f"run.dir={whole}"]) == 0
    assert values(tmp_path / "fp32", 0) == values(whole, 0)
    assert_same_weights(tmp_path / "fp32", whole)
    first = read_metrics(whole)[0]
    assert first["precision/share/fp32"] == pytest.approx(1.0)
    theirs = next(entry for entry in read_metrics(parent) if entry["step"] == FORK + 1)
    assert first["loss/lm"] != theirs["loss/lm"] and first["loss/lm"] == pytest.approx(theirs["loss/lm"], rel=0.02)
    noted = read_parent(whole)
    assert noted is not None and noted.changes["precision.default"] == ("nvfp4", "fp32")


def test_a_group_takes_the_whole_place_of_the_parents(parent: Path) -> None:
    made = branch_recipe(parse([checkpoint_of(parent), "precision=fp32", "optimizer.weight_decay=0.3", "run.stop_after=16steps"]), 1)
    assert made.precision.default == "fp32" and made.precision.rules == () and made.precision.compute == "fp32"
    assert made.optimizer.weight_decay == 0.3 and made.total_steps == 20 and made.last_step == 16
    assert made.run_dir == f"{parent}-step-{FORK}-fp32__weight_decay-0.3" and made.run.name == Path(made.run_dir).name


def test_the_other_way_to_give_the_length(parent: Path) -> None:
    made = branch_recipe(parse([checkpoint_of(parent), "train.tokens=9216 tokens"]), 1)
    assert made.train.steps is None and made.total_steps == 18


def test_microbatches_follow_the_number_of_ranks(parent: Path) -> None:
    assert branch_recipe(parse([checkpoint_of(parent)]), 1).micro_batch_size == 2
    assert branch_recipe(parse([checkpoint_of(parent)]), 8).micro_batch_size == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["run.seed=2"], "run.seed=2 differs from 1 .* a branch keeps the data its parent reads: leave it out, or start a run of its own"),
        (["data.validation_fraction=0.01"], "data.validation_fraction=0.01 differs from 0.001 .* a branch keeps the data its parent reads"),
        (["train.global_batch_size=4"], "train.global_batch_size=4 differs from 8"),
        (
            ["train.steps=12"],
            "train.steps ends the branch after step 12, but .*step-00000012 is at step 12: train longer, or fork at an earlier",
        ),
        (["run.stop_after=5steps"], "run.stop_after ends the branch after step 5"),
        (["precision=fp8"], "fp8"),
        (["precision=fp32,bf16"], r"is a sweep: give one value, or sweep over precisions with branch=\[bf16,fp32\]"),
        (["hydra.run.dir=x"], "is Hydra's own"),
        (["precision.rools=[]"], "rools"),
        (["every=6steps"], r"every=6steps belongs to a sweep"),
        (["--multirun"], "'--multirun' is not understood"),
        (["branch=[fp32]", "every=7steps"], "holds checkpoints of steps 6, 12, 18, 20, none of them"),
        (["branch=[fp32]", "every=soon"], "every='soon' is no duration"),
        (["branch=[]"], r"branch=\[\] names no precision"),
    ],
)
def test_bad_input_is_one_sentence(parent: Path, overrides: list[str], sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    place = f"checkpoint={parent}" if any(o.startswith("branch=") for o in overrides) else checkpoint_of(parent)
    assert branch([place, *overrides]) == 2
    said = capfd.readouterr().err.strip()
    assert re.search(sentence, said), said
    assert said.startswith("error: ") and "\n" not in said
    if "data.validation_fraction=0.01" in overrides:
        told("A branch is refused", said, "data.validation_fraction")
    if "run.stop_after=5steps" in overrides:
        told("A branch is refused", said, "run.stop_after ends")
    if "every=7steps" in overrides:
        told("A sweep of branches finds no checkpoint", said)
    assert not list(parent.parent.glob("x-step-12-*fp8*"))


def test_places_that_are_no_checkpoint(parent: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["precision=fp32"],
        [f"checkpoint={tmp_path}"],
        [checkpoint_of(parent, 13)],
        [checkpoint_of(parent), f"run.dir={parent}"],
    ):
        assert branch(arguments) == 2
        said = capfd.readouterr().err.strip()
        assert said.startswith("error: ") and "\n" not in said, said
        if arguments == [checkpoint_of(parent, 13)]:
            told("A branch is refused", said, "is not a valid checkpoint")


def test_another_parent_is_refused_for_a_branch_that_exists(parent: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = f"run.dir={tmp_path / 'one'}"
    assert branch([checkpoint_of(parent), where, "run.stop_after=13steps"]) == 0
    assert branch([checkpoint_of(parent, 6), where]) == 2
    assert "run.parent=" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_the_command_through_torchrun_and_as_a_sweep(parent: Path, tmp_path: Path) -> None:
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train.branch"]
    subprocess.run([*two, checkpoint_of(parent), f"run.dir={tmp_path / 'two'}"], check=True, timeout=200)
    ours, theirs = read_metrics(tmp_path / "two"), read_metrics(parent)[FORK:]
    assert [m["step"] for m in ours] == [m["step"] for m in theirs]
    assert ours[0]["loss/lm"] == pytest.approx(theirs[0]["loss/lm"], rel=1e-3)
    line = [sys.executable, "-m", "train.branch", f"checkpoint={parent}", "branch=[bf16,fp32]", "every=6steps"]
    done = subprocess.run(line, check=True, timeout=200, capture_output=True, text=True)
    assert "6 branches, 6 finished, 0 failed" in done.stdout
    assert json.loads((parent.with_name("x-step-6-bf16") / "finished.json").read_text())["step"] == 20
