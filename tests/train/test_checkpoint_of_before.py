"""A run begun by the program of before optimizers had names goes on: `before/` holds its recipe, its checkpoint of step 4, made by that
program, and the metrics of all 8 steps it took without an interruption."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parallel import groups
from tests.train.numbers import numbers_in
from train import loop
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.reader import open_checkpoint
from train.observe.metrics import read_metrics
from train.recipe.load import read_recipe
from train.recipe.tree import Recipe

BEFORE = Path(__file__).parent / "before"


def recipe_of(run_dir: Path, cache: Path) -> Recipe:
    values: dict[str, Any] = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    values["run"]["dir"], values["data"]["cache"] = str(run_dir), str(cache)
    return read_recipe(values, 1)


def test_its_state_is_read_and_written_again_bit_for_bit(tmp_path: Path) -> None:
    old = open_checkpoint(BEFORE)
    assert {name.split("/")[0] for name in old.names()} == {"model", "exp_avg", "exp_avg_sq", "step"}
    made = loop.build(recipe_of(BEFORE, tmp_path / "cache"))
    try:
        checkpointer = Checkpointer(tmp_path, made.engine, made.chunks)
        checkpointer.load(old)
        checkpointer.save(4, {})
    finally:
        groups.shutdown()
    new = open_checkpoint(tmp_path)
    assert new.names() == old.names()
    for name in old.names():
        a, b = old.read_full(name), new.read_full(name)
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_it_goes_on_as_if_never_interrupted(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(BEFORE, run_dir)
    (run_dir / "metrics.jsonl").unlink()
    assert loop.run(recipe_of(run_dir, tmp_path / "cache")) == 0
    whole = {m["step"]: m for m in read_metrics(BEFORE)}
    resumed = {m["step"]: m for m in read_metrics(run_dir)}
    assert sorted(resumed) == [5, 6, 7, 8]
    for step, metrics in resumed.items():
        for key, value in numbers_in(whole[step]).items():
            # The same bits on the machine that made it; GEMMs of other processors round otherwise.
            assert metrics[key] == pytest.approx(value, rel=1e-5), f"{key} of step {step}"
