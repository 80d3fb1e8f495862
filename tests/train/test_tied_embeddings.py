"""A head whose weight is the embedding's: the same on every layout, stored once, its gradient the sum of both uses."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import groups
from tests.train.recipes import recipe
from train import loop
from train.checkpoint.reader import open_checkpoint
from train.evaluate import main
from train.huggingface.config import check_exportable
from train.observe.metrics import read_metrics
from train.step import to_microbatch
from train.train_step import train_step

GIVEN = ("precision=fp32", "model.pattern=M*-E", "model.ffn_hidden_size=32", "model.tied_embeddings=true")


def trained(rank: int, *overrides: str) -> list[float]:
    made = loop.build(recipe(*GIVEN, *overrides, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    try:
        metrics = [train_step(made, step) for step in range(3)]
        return [each[name] for each in metrics for name in ("loss/lm", "grad_norm")]
    finally:
        groups.shutdown(leave_world=False)


@pytest.mark.parametrize("layout", [pytest.param("parallel.pipeline=2", marks=pytest.mark.slow), "parallel.tensor=2"])
def test_every_layout_trains_alike(ranks: Callable[[int], Callable[..., Any]], layout: str) -> None:
    expected = trained(0)
    groups.shutdown()
    for numbers in ranks(2)(trained, layout):
        assert numbers == pytest.approx(expected, rel=2e-5)


def test_its_gradient_is_that_of_both_uses() -> None:
    def gradients(tied: bool) -> dict[str, torch.Tensor]:
        made = loop.build(recipe(*GIVEN, "model.pattern=M*-", f"model.tied_embeddings={tied}"))
        try:
            model = made.chunks[0]
            if not tied:
                with torch.no_grad():
                    model.lm_head.weight.copy_(model.embeddings.weight)  # type: ignore[union-attr]
            model(to_microbatch(made.data.batch(range(2), 0), made.layout, 0.0, 0))[0].backward()
            return {name: weight.main_grad.clone() for name, weight in model.named_parameters()}  # type: ignore[attr-defined]
        finally:
            groups.shutdown()

    tied, apart = gradients(True), gradients(False)
    assert "lm_head.weight" not in tied
    both = apart["embeddings.weight"] + apart["lm_head.weight"]
    torch.testing.assert_close(tied["embeddings.weight"], both, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_holds_it_once_and_gives_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert loop.run(recipe(*GIVEN, "train.steps=3", "optimizer.warmup=1", "optimizer.decay=1", f"run.dir={run_dir}")) == 0
    names = open_checkpoint(run_dir).names()
    assert any("embeddings.weight" in name for name in names) and not any("lm_head" in name for name in names)
    capsys.readouterr()
    assert main([f"checkpoint={run_dir}"]) == 0
    assert f"validation loss {read_metrics(run_dir)[-1]['eval/loss']:.4f} nats per token" in capsys.readouterr().out
    ask = [f"checkpoint={run_dir}", "evaluators=[mqar]", "evaluation.mqar.examples=2"]
    assert main([*ask, "evaluation.mqar.tasks=[16x2,32x4]"]) == 0
    assert "mqar/16x2" in (said := capsys.readouterr().out) and "mqar/32x4" in said and "64x4" not in said
    for wrong, says in (
        ("evaluation.mqar.tasks=[512x64]", "needs more ids than"),
        ("evaluation.mqar.lengths=[16x2]", "evaluation.mqar.lengths"),
        ("evaluation.mqar=3", "evaluation.mqar"),
        ("evaluation.mqar.examples.few=2", "evaluation.mqar.examples"),
    ):
        assert main([*ask, wrong]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said


def test_it_is_not_exported() -> None:
    with pytest.raises(ValueError, match=r"model.tied_embeddings=true is not written"):
        check_exportable(recipe(*GIVEN).model)
