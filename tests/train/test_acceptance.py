"""accept/*: what MTP depths draft against what the trunk chooses, counted naively, whatever the layout; training does not notice."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Batch
from parallel import groups
from tests.train.numbers import numbers
from tests.train.recipes import recipe
from train import loop
from train.checkpoint.checkpointer import load_weights
from train.checkpoint.reader import open_checkpoint
from train.evaluate import main
from train.evaluation import measure
from train.evaluation.acceptance import Acceptance, accepted_counts
from train.evaluation.intervals import share_interval
from train.observe.metrics import read_metrics
from train.recipe.load import load_recipe
from train.step import to_microbatch

LENGTH = 24
GIVEN = (
    "precision=fp32",
    f"train.sequence_length={LENGTH}",
    "optimizer.warmup=1",
    "optimizer.decay=1",
    "evaluation.evaluators=[acceptance]",
    "evaluation.acceptance.windows=2",
    "evaluation.acceptance.domains=[novels,arithmetic,dialogue]",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model repeats itself enough for some drafts to be accepted."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert loop.run(recipe(*GIVEN, "train.steps=16", "evaluation.evaluators=[validation]", f"run.dir={run_dir}")) == 0
    return run_dir


def measured(rank: int, run_dir: str, *overrides: str) -> dict[str, float]:
    made = loop.build(recipe(*GIVEN, *overrides, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    try:
        load_weights(open_checkpoint(run_dir), made.chunks)
        return measure(made, made.recipe.evaluation.chosen(), 16)
    finally:
        groups.shutdown(leave_world=False)


def counted(run_dir: str) -> dict[str, list[list[int]]]:
    """{domain: [accepted, asked] of each depth}, from whole logits of texts that end where a head may look, one position at a time."""
    made = loop.build(recipe(*GIVEN))
    try:
        load_weights(open_checkpoint(run_dir), made.chunks)
        model, acceptance = made.chunks[0].eval(), made.recipe.evaluation.known["acceptance"]
        assert isinstance(acceptance, Acceptance)
        vocabulary, depths = made.data.tokenizer.vocab_size, made.mtp_depths

        def choice(window: torch.Tensor, seen: int, depth: int) -> int:
            """Of the head that has seen `seen` tokens, with no token behind them anywhere."""
            tokens = window[None, :seen]
            nothing = torch.zeros_like(tokens)
            batch = Batch(tokens, nothing, nothing.bool(), nothing.int(), False, torch.zeros(1, dtype=torch.int64), 0)
            with torch.no_grad():
                logits = model.logits(to_microbatch(batch, made.layout, 0.8, depths))[depth][0, seen - 1 - depth, :vocabulary]
            return int(logits.double().argmax())

        found = {}
        for domain in acceptance.domains:
            tally = [[0, 0] for _ in range(depths)]
            for window in torch.from_numpy(acceptance.text(domain, made).ids):
                for place in range(LENGTH - depths):
                    for depth in range(1, depths + 1):
                        tally[depth - 1][1] += 1
                        if choice(window, place + depth + 1, depth) != choice(window, place + depth + 1, 0):
                            break
                        tally[depth - 1][0] += 1
            found[domain] = tally
        return found
    finally:
        groups.shutdown()


def test_shares_are_those_counted_one_by_one(trained: Path) -> None:
    metrics = measured(0, str(trained))
    expected = counted(str(trained))
    shares = []
    for domain, tally in expected.items():
        for depth, (accepted, asked) in enumerate(tally, start=1):
            name = f"accept/{domain}/depth_{depth}"
            assert metrics[name] == accepted / asked
            assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
            shares.append(metrics[name])
    assert len(set(shares)) > 3 and 0 < min(shares) < max(shares), "nothing is told apart"


LAYOUTS = [
    pytest.param(2, ("parallel.pipeline=2",), id="pipeline", marks=pytest.mark.slow),
    pytest.param(2, ("parallel.context=2", "train.micro_batch_size=1"), id="context"),
    pytest.param(2, ("parallel.tensor=2", "parallel.expert=2"), id="tensor, expert", marks=pytest.mark.slow),
    pytest.param(4, ("parallel.tensor=2", "parallel.expert=2"), id="tensor, expert, data", marks=pytest.mark.slow),
    pytest.param(4, ("parallel.pipeline=2", "parallel.virtual_pipeline=2"), id="interleaved, data", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "overrides"), LAYOUTS)
def test_the_same_in_every_layout(
    trained: Path, ranks: Callable[[int], Callable[..., Any]], world: int, overrides: tuple[str, ...]
) -> None:
    alone = measured(0, str(trained))
    for metrics in ranks(world)(measured, str(trained), *overrides):
        assert metrics == alone


def test_training_does_not_notice(tmp_path: Path) -> None:
    given = ("train.steps=2", "train.eval_every=1", "optimizer.warmup=1", "optimizer.decay=1", "evaluation.acceptance.windows=2")
    both = "evaluation.evaluators=[validation,acceptance]"
    for name, overrides in (("without", ()), ("with", (both, "evaluation.acceptance.domains=[novels,json]"))):
        assert loop.run(recipe(*given, *overrides, f"run.dir={tmp_path / name}")) == 0
    rows = numbers(tmp_path / "with")
    kept = [{key: value for key, value in row.items() if not key.startswith("accept/")} for row in rows]
    assert kept == numbers(tmp_path / "without")
    assert sum(key.startswith("accept/") for key in rows[-1]) > 5
    assert read_metrics(tmp_path / "with")[-1]["seconds/evaluation/acceptance"] > 0


def test_the_command_says_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([f"checkpoint={trained}", "evaluators=[acceptance]"]) == 0
    shown = capsys.readouterr().out
    assert "drafts accepted: novels " in shown and "dialogue " in shown and "_low" not in shown


def test_conditional_counts() -> None:
    """Positions 0 ... 3 of one window of 6 tokens and 2 depths: depth 1 is right at 0, 1 and 3, depth 2 at 1 and 2."""
    trunk = [0, 1, 2, 3, 4, 5]
    first, second = [1, 2, 9, 4, 0, 0], [9, 3, 4, 9, 0, 0]
    chosen = np.array([[trunk, first, second]])
    assert accepted_counts(chosen, np.array([6])).tolist() == [[4, 3, 1]]
    assert accepted_counts(chosen, np.array([5])).tolist() == [[3, 2, 1]]
    assert accepted_counts(chosen, np.array([2])).tolist() == [[0, 0, 0]]


def test_the_interval_is_that_of_a_share() -> None:
    """Between windows that share a coin it is wide, as their tokens are no independent draws; between many coins it is the normal one."""
    draws = np.random.default_rng(1)
    tries = np.full(400, 50)
    coins = draws.binomial(50, 0.3, 400)
    share, low, high = share_interval(coins, tries)
    error = np.sqrt(0.3 * 0.7 / 20_000)
    assert share == coins.sum() / 20_000 and low < share < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    _, low, high = share_interval(50 * draws.binomial(1, 0.3, 400), tries)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 400), rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("evaluation.acceptance.domains=[novels,poems]",), ["evaluation.acceptance.domains[1]='poems'", "dialogue"]),
        (("evaluation.acceptance.windows=1",), ["evaluation.acceptance.windows=1", "at least 2"]),
        (("evaluation.evaluators=[acceptance]", "model.pattern=ME"), ["acceptance", "model.pattern=ME", "no MTP depth"]),
    ],
)
def test_what_cannot_be_measured_is_refused(overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        load_recipe("tiny", *overrides)
    assert all(word in str(refused.value) for word in words)
