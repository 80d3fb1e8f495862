"""What a model answers to tasks of recall, on any layout, against whole logits; and the head that works only where targets count."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from data.hashing import digest
from data.mqar import MQAR
from parallel import groups
from tests.train.recipes import recipe
from train import loop
from train.evaluation import measure
from train.evaluation.answers import answers
from train.recipe.reading import RecipeError
from train.step import to_microbatch
from train.train_step import train_step

GIVEN = (
    "data=mqar",
    "data.phases=[{blend:[{path:'mqar:32x4'}]}]",
    "data.tokenizer.vocab_size=48",
    "data.validation_fraction=0",
    "model.vocab_size=48",
    "precision=fp32",
    "evaluation.evaluators=[mqar]",
    "evaluation.mqar.tasks=[32x4]",
)
TASK = MQAR(32, 4, 48)
SAMPLES = [TASK.draw(digest("answers", index), 32) for index in range(13)]


def answered(rank: int, *overrides: str) -> tuple[list[int], dict[str, float]]:
    made = loop.build(recipe(*GIVEN, *overrides, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    try:
        found = answers(made, 0, SAMPLES)
        assert found.targets.tolist() == [4] * 13
        assert found.accuracy == 1 - found.wrong.sum() / 52 and found.exact == (found.wrong == 0).mean()
        return found.wrong.tolist(), measure(made, made.recipe.evaluation.chosen(), 0)
    finally:
        groups.shutdown(leave_world=False)


def plain() -> list[int]:
    """Wrong answers from whole logits."""
    made = loop.build(recipe(*GIVEN))
    try:
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in SAMPLES]))
        batch = made.data.batch(range(13), 0)
        given = {"tokens": tokens, "documents": torch.zeros_like(tokens).int(), "reset": False}
        batch = type(batch)(**(vars(batch) | {name: value[:, :32] for name, value in _tensors(vars(batch)).items()} | given))
        with torch.no_grad():
            logits = made.chunks[0].eval().logits(to_microbatch(batch, made.layout, 0.0, made.recipe.model.mtp_depths))[0]
        said = logits.argmax(-1).numpy()
        return [int((said[row] != sample.labels)[sample.counts].sum()) for row, sample in enumerate(SAMPLES)]
    finally:
        groups.shutdown()


def _tensors(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor) and value.dim() == 2}


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ()),
        (1, ("model.head_at_targets=true",)),
        (2, ()),
        pytest.param(2, ("parallel.pipeline=2",), marks=pytest.mark.slow),
        pytest.param(2, ("parallel.tensor=2",), marks=pytest.mark.slow),
        pytest.param(2, ("parallel.context=2", "model.head_at_targets=true"), marks=pytest.mark.slow),
    ],
    ids=["one rank", "targets", "data", "pipeline", "tensor", "context"],
)
def test_every_layout_counts_the_same_wrong_answers(
    ranks: Callable[[int], Callable[..., Any]], world: int, overrides: tuple[str, ...]
) -> None:
    expected = plain()
    assert 0 < sum(expected) <= 52
    for wrong, metrics in ranks(world)(answered, *overrides):
        assert wrong == expected
        assert set(metrics) == {"mqar/32x4"} and 0 <= metrics["mqar/32x4"] < 0.5


@pytest.mark.parametrize("pattern", ["M*-E/*E", "M*-E"])
def test_a_head_only_at_targets_trains_as_the_whole_one(pattern: str) -> None:
    def trained(whole: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        made = loop.build(recipe(*GIVEN, f"model.pattern={pattern}", "model.ffn_hidden_size=32", f"model.head_at_targets={not whole}"))
        try:
            metrics = [train_step(made, step) for step in range(3)]
            return [each[name] for each in metrics for name in ("loss/total", "grad_norm")], {
                name: value.detach().clone() for name, value in made.chunks[0].named_parameters()
            }
        finally:
            groups.shutdown()

    (numbers, weights), (expected, wanted) = trained(False), trained(True)
    assert numbers == pytest.approx(expected, rel=2e-6)
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_a_head_only_at_targets_wants_the_whole_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"model.head_at_targets=true works on the whole vocabulary, but parallel.tensor=2 splits it"):
        recipe(*GIVEN, "model.head_at_targets=true", "parallel.tensor=2", world_size=2)


NUMBERS = ("data=mqar", "data.phases=[{blend:[{path:'mqar:32x4'}]}]", "data.tokenizer.vocab_size=48", "data.validation_fraction=0")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*NUMBERS, "evaluation.evaluators=[mqar]"], ["evaluation.mqar.tasks[0]='64x4'", "needs more ids than the 48 there are"]),
        ([*NUMBERS, "evaluation.evaluators=[mqar]", "evaluation.mqar.examples=0"], ["evaluation.mqar", "0 examples"]),
        ([*NUMBERS, "evaluation.evaluators=[needle]"], ["needle, whose texts are bytes", "data.tokenizer.kind=bytes"]),
        (["evaluation.evaluators=[needle]"], ["train.sequence_length=64", "does not fit into sequences of 64 bytes"]),
        (["evaluation.evaluators=[needle]", "evaluation.needle.times=[]"], ["times=[]", "at least one of each"]),
        (
            ["evaluation.evaluators=[needle]", "evaluation.needle.tasks=[niah_single_2]", "evaluation.needle.times=[32,65536]"],
            ["evaluation.needle", "too few for a haystack"],
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_there_is_a_model(
    overrides: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.build.build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(RecipeError) as error:  # which the command says in one sentence
        loop.build(recipe("precision=fp32", *overrides))
    groups.shutdown()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)
