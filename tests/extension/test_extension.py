"""The seams hold: a mixer, a number format, an optimizer, an evaluator and an observer, added in this folder alone through public registration,
train on one and on two ranks, go on bit for bit after a stop, and are seen wherever the product's own are."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

from model.config import ModelConfig
from model.count import count, linear_modules
from model.mixer import MIXERS
from model.precision.formats.registry import FORMATS
from tests.extension.everything import register
from tests.train.numbers import numbers
from train import loop
from train.checkpoint.reader import open_checkpoint
from train.evaluation.base import EVALUATORS
from train.huggingface.export import export
from train.observe.base import OBSERVERS
from train.optimizer import OPTIMIZERS
from train.recipe import cli
from train.recipe.load import load_recipe
from train.recipe.reading import RecipeError
from train.report.report import write_report

ROOT = Path(__file__).resolve().parents[2]
ONE_RANK = (sys.executable, "-m", "tests.extension")
TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.extension")
RECIPE = ("--config-dir", str(ROOT / "tests" / "extension" / "recipes"), "-cn", "extended")


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """In this process too, and for this module alone."""
    with contextlib.ExitStack() as kept:
        for registry in (MIXERS, FORMATS, OPTIMIZERS, EVALUATORS, OBSERVERS):
            kept.enter_context(patch.dict(registry))  # type: ignore[call-overload]
        register()
        yield


def train(start: tuple[str, ...], *overrides: str, place: Path = ROOT) -> str:
    """What the real command prints."""
    done = subprocess.run(
        [*start, *RECIPE, *overrides],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def train_here(*overrides: str) -> str:
    """The same on one rank, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(loop.run, "tests.extension", [*RECIPE, *overrides]) == 0
    return printed.getvalue()


Runs = tuple[Path, Path, str]
"""A run of eight steps, the same stopped after four and continued, and what the first printed."""


def runs(run: Callable[..., str], place: Path) -> Runs:
    whole, parts = place / "whole", place / "parts"
    printed = run(f"run.dir={whole}")
    run(f"run.dir={parts}", "run.stop_after=4")
    run(f"run.dir={parts}")
    return whole, parts, printed


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return runs(train_here, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    layout = ("parallel.tensor=2", "parallel.expert=2", "parallel.distributed_optimizer=true")
    return runs(partial(train, TWO_RANKS, *layout), tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", ["one", pytest.param("two", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(name: str, request: pytest.FixtureRequest) -> None:
    whole, parts, _ = request.getfixturevalue(name)
    assert numbers(parts) == numbers(whole)
    assert [entry["step"] for entry in numbers(whole)] == list(range(1, 9))
    ours, theirs = open_checkpoint(whole), open_checkpoint(parts)
    assert ours.names() == theirs.names()
    for tensor in ours.names():
        assert torch.equal(ours.read_full(tensor), theirs.read_full(tensor)), tensor
    state = {tensor.split("/")[0] for tensor in ours.names()}
    assert "momentum_buffer" in state and not state & {"exp_avg", "exp_avg_sq"}


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(one: Runs, two: Runs) -> None:
    """Operands in `eighths` have amaxes of rows, which tensor parallelism cuts: the runs agree as far as quantisation lets them."""
    alone, together = numbers(one[0]), numbers(two[0])
    assert alone[0]["loss/lm"] == pytest.approx(together[0]["loss/lm"], rel=1e-3)
    assert alone[-1]["loss/lm"] == pytest.approx(together[-1]["loss/lm"], rel=2e-2)
    assert alone[-1]["loss/lm"] < alone[0]["loss/lm"] - 0.1


def test_everything_is_seen(one: Runs, tmp_path: Path) -> None:
    run_dir, continued_dir, printed = one
    last = numbers(run_dir)[-1]
    # the format, with its options, in the table of the run, its share of the FLOPs in every line, and its health
    assert "eighths(levels=16)" in printed and last["precision/share/eighths"] > 0.5
    assert last["precision/layers.1.mixer.in_proj/x/sqnr_db"] > 10
    # the evaluator
    assert 0 < last["eval/first_windows"] != last["eval/loss"]
    # the observer, which counted on over the stop
    assert (run_dir / "diary.txt").read_text().splitlines() == [
        "start after step 0, having seen 0",
        "end after step 8, having seen 8",
        "closed",
    ]
    continued = (continued_dir / "diary.txt").read_text().splitlines()
    assert continued[-3:] == ["start after step 4, having seen 4", "end after step 8, having seen 8", "closed"]
    # keys of all five in the stored recipe
    stored = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert stored["model"]["shift_size"] == 48 and stored["optimizer"]["sgd"] == {"momentum": 0.8}
    assert stored["precision"]["rules"][0]["eighths"] == {"levels": 16}
    assert stored["evaluation"]["first_windows"] == {"batches": 2} and stored["monitor"]["observers"] == ["diary"]
    # the report
    write_report([run_dir, continued_dir], tmp_path / "report")
    assert {"precision.png", "sqnr.png"} <= {path.name for path in (tmp_path / "report").iterdir()}


def test_counts_know_the_mixer() -> None:
    config = ModelConfig.of(pattern="S", vocab_size=64, hidden_size=32, shift_size=48)
    assert count(config).parameters == 2 * 64 * 32 + 32 + 2 * 32 * 48 + 32  # embedding and head, norm, the mixer, final norm
    assert {m.name: m.flops for m in linear_modules(config)}["layers.0.mixer.in_proj"] == 2 * 32 * 48


def test_what_is_wrong_with_it_is_one_sentence(one: Runs, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.shift_size is missing: .*'S'"):
        load_recipe("tiny", "model.pattern=MS*E")
    with pytest.raises(RecipeError, match=r"model.shift_size=9 .*parallel.tensor=2"):
        load_recipe("tiny", "model.pattern=MS*E", "model.shift_size=9", "parallel.tensor=2", world_size=2)
    with pytest.raises(RecipeError, match=r"precision.rules\[0\].eighths.levels=0 must be at least 1"):
        load_recipe("tiny", "precision.rules=[{format: eighths, eighths: {levels: 0}}]")
    with pytest.raises(RecipeError, match=r"optimizer.betas=.* has no meaning for optimizer.name=sgd"):
        load_recipe("tiny", "optimizer.name=sgd", "optimizer.betas=[0.8,0.9]")
    with pytest.raises(ValueError, match=r"'S'"):
        export(open_checkpoint(one[0]), tmp_path / "exported")


@pytest.mark.slow
def test_a_sweep_starts_its_jobs_as_the_module_that_registers(tmp_path: Path) -> None:
    printed = train(ONE_RANK, "-m", "optimizer.sgd.momentum=0.5,0.9", "train.steps=2", place=tmp_path)
    assert "2 jobs, 2 finished" in printed
    assert (tmp_path / "runs" / "extended-sweep" / "momentum-0.5" / "finished.json").exists()
