"""Training with bf16 activations on a CPU: one rank against many, through real collectives."""

import os
from typing import Any

import pytest
import torch

from parallel import groups
from parallel.replicas import differing_replicas
from tests.train.recipes import recipe
from train import loop
from train.train_step import train_step

STEPS = 8
RUN = ("precision=bf16", "precision.compute=bf16", "model.router_aux_loss=0.01", "optimizer.learning_rate=1e-3")
LOSSES = ("loss/lm", "loss/mtp_1", "loss/mtp_2")


def train(rank: int, *overrides: str) -> tuple[list[dict[str, float]], list[str]]:
    """Metrics of STEPS steps, and the replicas that differ at the end."""
    made = loop.build(recipe(*RUN, *overrides, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    try:
        params = list(made.chunks[0].parameters())
        assert {p.dtype for p in params} == {made.context.params_dtype}
        assert all(p.main_grad.dtype == torch.float32 for p in params)  # type: ignore[attr-defined]
        return [train_step(made, step) for step in range(STEPS)], differing_replicas(made.chunks[0])
    finally:
        groups.shutdown(leave_world=False)


@pytest.fixture(scope="module")
def single(_pool: Any) -> list[dict[str, float]]:
    ((metrics, _),) = _pool.run(1, train, timeout=250)
    return metrics


@pytest.fixture(scope="module")
def rounding(_pool: Any, single: list[dict[str, float]]) -> float:
    """How far bf16 activations move a loss at all: the largest difference from the run with fp32 activations, over losses and steps."""
    ((exact, _),) = _pool.run(1, train, "precision.compute=fp32", timeout=250)
    return max(abs(ours[key] - theirs[key]) for ours, theirs in zip(single, exact, strict=True) for key in LOSSES)


def test_one_rank_learns(single: list[dict[str, float]], rounding: float) -> None:
    assert single[-1]["loss/lm"] < single[0]["loss/lm"] - 0.3
    assert 1e-6 < rounding < 0.05


@pytest.mark.parametrize(
    "layout", ["parallel.tensor=2", *(pytest.param(f"parallel.{axis}=2", marks=pytest.mark.slow) for axis in ("expert", "pipeline"))]
)
def test_a_layout_gives_the_losses_of_one_rank(layout: str, single: Any, rounding: float, ranks: Any) -> None:
    """Both round each activation once to bf16, from sums in another order: two runs at most as far from each other as both are from exact ones."""
    for metrics, differing in ranks(2)(train, layout, timeout=250):
        assert differing == []
        for step, (ours, theirs) in enumerate(zip(metrics, single, strict=True)):
            for key in LOSSES:
                assert abs(ours[key] - theirs[key]) <= 2 * rounding, f"{key} of step {step}: {ours[key]} instead of {theirs[key]}"
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
