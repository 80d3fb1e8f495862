"""What a run that goes on may change: its layout and length, and nothing that a step done depended on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.train.recipes import SMALL, recipe
from train import loop
from train.checkpoint.reader import open_checkpoint
from train.observe.metrics import read_metrics
from train.recipe.load import load_recipe
from train.recipe.reading import RecipeError, plain
from train.recipe.resume import changed_keys

GIVEN = ("precision=fp32", "train.steps=4", "optimizer.warmup=1", "optimizer.decay=0", "data.validation_fraction=0.0005")


def changes(old: tuple[str, ...], new: tuple[str, ...], done: int) -> dict[str, Any]:
    return changed_keys(plain(recipe(*GIVEN, *old)), recipe(*GIVEN, *new), done)


ALLOWED: list[tuple[tuple[str, ...], tuple[str, ...], int]] = [
    ((), ("train.steps=9",), 4),  # finished, and lengthened
    (("optimizer.decay=2",), ("optimizer.decay=2", "train.steps=9"), 2),  # before its decay
    (("optimizer.decay=50%",), ("optimizer.decay=50%", "train.steps=8"), 2),
    (("optimizer.decay=2",), ("optimizer.decay=50%",), 4),  # the same
    ((), ("optimizer.decay=5", "train.steps=9"), 4),  # a decay that begins after what is done
    ((), ("train.steps=null", "train.tokens=5k tokens"), 4),
    ((), ("train.micro_batch_size=4", "parallel.distributed_optimizer=true", "train.eval_every=1"), 4),
    ((), ("optimizer.learning_rate=1e-3", "run.allow=[optimizer.learning_rate]"), 4),
    ((), ("optimizer.learning_rate=1e-3", "run.allow=[optimizer.learning_rate]", "train.steps=9"), 4),
    ((), ("optimizer.weight_decay=0.2", "run.allow=[optimizer.weight_decay]"), 4),
    (
        ("precision=nvfp4", "+precision.schedule=[{format:bf16,start:3steps}]"),
        ("precision=nvfp4", "+precision.schedule=[{format:bf16,start:3steps}]", "train.steps=9"),
        4,
    ),
    (
        ("data.phases=[{blend:[{path:'corpus:austen'}]}]",),
        ("data.phases=[{tokens:2048,blend:[{path:'corpus:austen'}]},{blend:[{path:'corpus:jargon'}]}]", "train.steps=9"),
        4,  # 32 samples of 64 tokens
    ),
]
REFUSED: list[tuple[tuple[str, ...], tuple[str, ...], int, list[str]]] = [
    ((), ("optimizer.learning_rate=1e-3",), 1, ["optimizer.learning_rate=0.001 instead of 0.004", "run.allow=[optimizer.learning_rate]"]),
    (
        ("optimizer.decay=2",),
        ("optimizer.decay=2", "train.steps=9"),
        3,
        ["train.steps=9 instead of 4", "step 3", "checkpoint.initialize_from="],
    ),
    (
        ("optimizer.decay=50%",),
        ("optimizer.decay=50%", "train.steps=9"),
        4,
        ["train.steps=9", "learning rate", "checkpoint.initialize_from="],
    ),
    ((), ("optimizer.decay=3",), 3, ["optimizer.decay=3 instead of 0", "step 2", "run.allow=[optimizer.decay]"]),
    ((), ("train.steps=3",), 4, ["has done 4 steps", "train.steps=3", "train longer"]),
    ((), ("optimizer.weight_decay=0.2",), 0, ["optimizer.weight_decay=0.2 differs from 0.1", "run.allow=[optimizer.weight_decay]"]),
    ((), ("run.seed=2", "run.allow=[optimizer.clip]"), 1, ["run.seed=2 differs from 1", "set it back"]),
    ((), ("model.hidden_size=64",), 1, ["model.hidden_size=64 differs from 32"]),
    (
        ("precision=nvfp4", "+precision.schedule=[{format:bf16,start:0.5}]"),
        ("precision=nvfp4", "+precision.schedule=[{format:bf16,start:0.5}]", "train.steps=9"),
        4,
        ["train.steps=9 moves precision.schedule", "step 3", "in nvfp4/nvfp4/nvfp4 instead of bf16/bf16/bf16", "write them in steps"],
    ),
    (
        ("data.phases=[{blend:[{path:'corpus:austen'}]}]",),
        ("data.phases=[{tokens:1984,blend:[{path:'corpus:austen'}]},{blend:[{path:'corpus:jargon'}]}]",),
        4,
        ["data.phases differ", "32 samples", "append a phase"],
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "done"), ALLOWED, ids=lambda value: " ".join(value)[-60:] if isinstance(value, tuple) else str(value)
)
def test_what_may_change(old: tuple[str, ...], new: tuple[str, ...], done: int) -> None:
    keys = set(changes(old, new, done))
    assert keys <= {key.lstrip("+").split("=")[0] for key in (*old, *new)}


def test_a_length_written_otherwise_is_no_change() -> None:
    assert changes(("optimizer.decay=2",), ("optimizer.decay=50%",), 4) == {}


@pytest.mark.parametrize(
    ("old", "new", "done", "named"), REFUSED, ids=lambda value: " ".join(value)[-60:] if isinstance(value, tuple) else ""
)
def test_what_may_not(old: tuple[str, ...], new: tuple[str, ...], done: int, named: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        changes(old, new, done)
    for part in named:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_layers_may_lie_on_other_stages() -> None:
    elsewhere = recipe(*GIVEN, "model.pattern='MEM|*EME/*E/*E'", "parallel.pipeline=2", world_size=2)
    assert list(changed_keys(plain(recipe(*GIVEN)), elsewhere, 4)) == ["model.pattern", "parallel.pipeline"]
    others = recipe(*GIVEN, "model.pattern='MEM|EME/*E/*E'", "parallel.pipeline=2", world_size=2)
    with pytest.raises(RecipeError, match=r"model.pattern='MEM\|EME.* differs from"):
        changed_keys(plain(recipe(*GIVEN)), others, 4)


def test_keys_an_old_recipe_does_not_know_had_their_defaults() -> None:
    stored = plain(recipe(*GIVEN))
    del stored["evaluation"], stored["run"]["allow"], stored["monitor"]["observers"], stored["optimizer"]["eps"]
    assert changed_keys(stored, recipe(*GIVEN), 4) == {}
    assert list(changed_keys(stored, recipe(*GIVEN, "monitor.picture=true"), 4)) == ["monitor.picture"]
    with pytest.raises(RecipeError, match=r"optimizer.eps=1e-07 differs from 1e-08"):
        changed_keys(stored, recipe(*GIVEN, "optimizer.eps=1e-7"), 4)
    stored["evaluation"] = {"evaluators": ["gone"], "gone": {"key": 1}}  # an evaluator that nobody registers any more
    assert list(changed_keys(stored, recipe(*GIVEN), 4)) == ["evaluation.evaluators"]


def numbers(run_dir: Path) -> list[tuple[float, ...]]:
    return [(m["step"], m["loss/lm"], m["grad_norm"], m["learning_rate"]) for m in read_metrics(run_dir)]


@pytest.mark.slow
def test_a_finished_run_is_lengthened_and_its_history_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    longer = ("train.steps=6", "optimizer.decay=2")
    assert loop.run(recipe(*GIVEN, *longer, f"run.dir={whole}")) == 0
    assert loop.run(recipe(*GIVEN, f"run.dir={run_dir}")) == 0
    before = (run_dir / "recipe.yaml").read_text()
    assert json.loads((run_dir / "finished.json").read_text())["step"] == 4
    capsys.readouterr()
    assert loop.run(recipe(*GIVEN, *longer, f"run.dir={run_dir}")) == 0
    assert "changed since the run began: train.steps: 4 -> 6" in capsys.readouterr().out
    assert json.loads((run_dir / "finished.json").read_text())["step"] == 6
    assert numbers(run_dir) == numbers(whole)
    ours, theirs = open_checkpoint(run_dir), open_checkpoint(whole)
    assert all(torch.equal(ours.read_full(name), theirs.read_full(name)) for name in theirs.names())
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["train"]["steps"] == 6
    assert (run_dir / "recipe.before-00000004.yaml").read_text() == before
    (line,) = (json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines())
    assert line["step"] == 4 and line["changes"] == {"train.steps": [4, 6], "optimizer.decay": [0, 2]}
    assert loop.run(recipe(*GIVEN, *longer, f"run.dir={run_dir}")) == 0
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"has done 6 steps"):
        loop.run(recipe(*GIVEN, f"run.dir={run_dir}"))


def test_the_learning_rate_changes_on_purpose_from_the_next_step_on(tmp_path: Path) -> None:
    where = f"run.dir={tmp_path / 'run'}"
    assert loop.run(recipe(*GIVEN, where, "run.stop_after=2")) == 0
    with pytest.raises(RecipeError, match=r"run.allow=\[optimizer.learning_rate\]"):
        loop.run(recipe(*GIVEN, where, "optimizer.learning_rate=1e-3"))
    assert loop.run(recipe(*GIVEN, where, "run.stop_after=3", "optimizer.learning_rate=1e-3", "run.allow=[optimizer.learning_rate]")) == 0
    assert loop.run(recipe(*GIVEN, where, "optimizer.learning_rate=1e-3")) == 0  # no change any more
    assert [m["learning_rate"] for m in read_metrics(tmp_path / "run")] == [4e-3, 4e-3, 1e-3, 1e-3]


def on_two_ranks(rank: int, *overrides: str) -> int:
    return loop.run(load_recipe("tiny", *SMALL, *GIVEN, *overrides, world_size=2))


def test_a_run_goes_on_in_another_layout_and_microbatch(
    ranks: Callable[[int], Callable[..., Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert loop.run(recipe(*GIVEN, f"run.dir={whole}")) == 0
    assert loop.run(recipe(*GIVEN, f"run.dir={run_dir}", "run.stop_after=1")) == 0
    changed = (f"run.dir={run_dir}", "parallel.tensor=2", "train.micro_batch_size=4")
    assert ranks(2)(on_two_ranks, *changed, "run.stop_after=3") == [0, 0]
    assert loop.run(recipe(*GIVEN, f"run.dir={run_dir}")) == 0
    assert "changed since the run began: parallel.tensor: 2 -> 1" in capsys.readouterr().out
    for (step, loss, norm, rate), expected in zip(numbers(run_dir), numbers(whole), strict=True):
        assert (step, rate) == (expected[0], expected[3])
        assert (loss, norm) == pytest.approx(expected[1:3], rel=1e-5)
    assert len((run_dir / "history.jsonl").read_text().splitlines()) == 2
