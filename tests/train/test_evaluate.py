"""eval/loss is the plain cross entropy of every validation token, whatever the layout."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import groups
from tests.train.recipes import recipe
from train import loop
from train.evaluate import main
from train.evaluation import measure
from train.observe.metrics import read_metrics
from train.step import to_microbatch

GIVEN = ("precision=fp32", "train.micro_batch_size=4", "data.validation_fraction=0.00105")


def evaluated(rank: int, *overrides: str) -> tuple[float, int]:
    """What the evaluators say of a new model, and the number of validation batches."""
    made = loop.build(recipe(*GIVEN, *overrides, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    try:
        loss = measure(made, made.recipe.evaluation.chosen(), 0)["eval/loss"]
        return loss, len(made.data.validation_batches(made.recipe.micro_batch_size))
    finally:
        groups.shutdown(leave_world=False)


def plain() -> float:
    """The same from whole logits, in fp64."""
    made = loop.build(recipe(*GIVEN))
    try:
        made.chunks[0].eval()
        total = count = 0.0
        for batch in made.data.validation_batches(3):
            with torch.no_grad():
                logits = made.chunks[0].logits(to_microbatch(batch, made.layout, 0.0, made.recipe.model.mtp_depths))[0].double()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            total += float(losses[batch.loss_mask.flatten()].sum())
            count += float(batch.loss_mask.sum())
        assert count == made.data.validation_tokens > 1000
        return total / count
    finally:
        groups.shutdown()


@pytest.mark.parametrize(
    ("world", "overrides"),
    [(1, ()), (2, ()), (2, ("parallel.pipeline=2",)), (2, ("parallel.tensor=2",))],
    ids=["one rank", "data", "pipeline", "tensor"],
)
def test_the_loss_of_every_validation_token(ranks: Callable[[int], Callable[..., Any]], world: int, overrides: tuple[str, ...]) -> None:
    expected = plain()
    for loss, batches in ranks(world)(evaluated, *overrides):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert batches % 2 == 1, "a rank has to go on with masked windows"


def test_the_command_repeats_what_the_run_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert loop.run(recipe("train.steps=3", "optimizer.warmup=1", "optimizer.decay=1", f"run.dir={run_dir}")) == 0
    capsys.readouterr()
    assert main([f"checkpoint={run_dir}"]) == 0
    logged = read_metrics(run_dir)[-1]["eval/loss"]
    assert f"validation loss {logged:.4f} nats per token" in capsys.readouterr().out
    assert main([f"checkpoint={tmp_path / 'nowhere'}"]) == 2
    assert main(["chekpoint=x"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
