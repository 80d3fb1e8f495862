"""A run that goes from engine to engine, through the command line, has the losses of the run that Megatron did alone on one rank."""

import importlib.util
from pathlib import Path

import pytest

from tests.layouts import reshard
from train.observe.metrics import read_metrics

DEEPSPEED = "parallel.engine=deepspeed"
# At the recipe's own learning rate, four times as much, the gradient norm of a spike in the seventh step amplifies rounding to 5e-6.
CALM = "optimizer.learning_rate=1e-3"
GIVEN = ("precision=fp32", "train.steps=8", "optimizer.warmup=1", "optimizer.decay=0", "data.validation_fraction=0.0005", CALM)
LEGS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (2, (DEEPSPEED, "parallel.zero_stage=2")),
    (2, ("parallel.pipeline=2",)),
    (2, (DEEPSPEED, "parallel.expert=2", "parallel.offload_optimizer=true")),
    (2, ("parallel.distributed_optimizer=true",)),
    (2, (DEEPSPEED, "parallel.tensor=2")),
    (2, (DEEPSPEED, "parallel.zero_stage=3")),
)


def start(ranks: int, *overrides: str) -> str:
    return reshard.start(ranks, *GIVEN, *overrides)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="the package deepspeed is not installed: pip install -c constraints.txt -e '.[deepspeed]'",
)
def test_one_engine_after_the_other(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    start(1, f"run.dir={whole}")
    for step, (ranks, layout) in enumerate(LEGS, start=1):
        printed = start(ranks, f"run.dir={run}", f"run.stop_after={step}", *layout)
        assert ("DeepSpeed ZeRO-" in printed) == (DEEPSPEED in layout)
    start(1, f"run.dir={run}")
    ours, theirs = read_metrics(run), read_metrics(whole)
    assert [m["step"] for m in ours] == [m["step"] for m in theirs] == list(range(1, 9))
    for mine, expected in zip(ours, theirs, strict=True):
        for key in ("loss/lm", "loss/mtp_1", "loss/mtp_2", "grad_norm", "moe/aux_loss"):
            assert mine[key] == pytest.approx(expected[key], rel=2e-6), (key, mine["step"])
