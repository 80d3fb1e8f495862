"""One rank against many: the same losses over 20 steps, and the same bits in every replica."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from parallel import groups
from parallel.replicas import differing_replicas
from tests.train.recipes import recipe
from train import loop
from train.build import Run
from train.step import LossStep, sum_over_ranks, to_microbatch
from train.train_step import train_step

OVERLAPPED = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "uneven pipeline": (2, ("parallel.pipeline=2", "model.pattern='MEM*E|ME/*E/*E'")),
    "virtual pipeline": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "expert tensor": (2, ("parallel.expert_tensor=2",)),
    "tensor+sequence": (2, ("parallel.tensor=2",)),
    "expert": (2, ("parallel.expert=2",)),
    "pipeline": (2, ("parallel.pipeline=2",)),
    "data": (2, ()),
    "data, distributed optimizer": (2, ("parallel.distributed_optimizer=true",)),
    "tensor x expert": (4, ("parallel.tensor=2", "parallel.expert=2")),
    "tensor x data, experts whole": (4, ("parallel.tensor=2",)),
    "context": (2, ("parallel.context=2",)),
    "tensor x pipeline": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
}
SLOW: dict[str, tuple[int, tuple[str, ...]]] = {
    "virtual pipeline by |": (
        2,
        ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.pattern='M|EM|*|EME/*E/*E'", "train.micro_batch_size=1"),
    ),
    "tensor x virtual pipeline": (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "data x virtual pipeline, all overlapped": (
        4,
        ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.distributed_optimizer=true", *OVERLAPPED),
    ),
    "pipeline 4": (4, ("parallel.pipeline=4",)),
    "gradient reduce overlapped": (2, ("parallel.overlap_grad_reduce=true",)),
    "all overlapped": (2, ("parallel.distributed_optimizer=true", *OVERLAPPED)),
    "context, Mamba by all-to-all": (2, ("parallel.context=2", "parallel.context_mamba=all_to_all")),
    "context 4": (4, ("parallel.context=4",)),
    "context 4, Mamba by all-to-all": (4, ("parallel.context=4", "parallel.context_mamba=all_to_all")),
    "context x tensor": (4, ("parallel.context=2", "parallel.tensor=2")),
    "context x tensor, Mamba by all-to-all": (4, ("parallel.context=2", "parallel.tensor=2", "parallel.context_mamba=all_to_all")),
    "context x expert": (2, ("parallel.context=2", "parallel.expert=2")),
    "context x pipeline": (4, ("parallel.context=2", "parallel.pipeline=2")),
    "context x virtual pipeline": (4, ("parallel.context=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "context x expert tensor": (2, ("parallel.context=2", "parallel.expert_tensor=2")),
    "context x data, distributed optimizer": (4, ("parallel.context=2", "parallel.distributed_optimizer=true")),
    "tensor, experts whole": (2, ("parallel.tensor=2", "parallel.expert_tensor=1")),
    "tensor x expert tensor": (2, ("parallel.tensor=2", "parallel.expert_tensor=2")),
    "expert x expert tensor": (4, ("parallel.expert=2", "parallel.expert_tensor=2")),
    "tensor x expert x expert tensor": (4, ("parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=2")),
    "expert tensor, distributed optimizer": (4, ("parallel.expert_tensor=2", "parallel.distributed_optimizer=true")),
}
STEPS = 20


def train(rank: int, overrides: tuple[str, ...]) -> tuple[list[dict[str, float]], list[str]]:
    """Metrics of STEPS steps, and the replicas that differ at the end."""
    made = loop.build(recipe(*overrides, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    try:
        metrics = [train_step(made, step) for step in range(STEPS)]
        made.engine.settle()
        metrics[-1]["one microbatch"] = evaluated(made)
        return metrics, differing_replicas(*made.chunks)
    finally:
        groups.shutdown(leave_world=False)


def evaluated(run: Run) -> float:
    """The LM loss of one microbatch, on every data-parallel rank the same."""
    microbatch = to_microbatch(run.data.batch([0, 1], STEPS), run.layout, 0.0, run.mtp_depths)
    counts = sum_over_ranks(microbatch.loss_counts(), run.layout, pipeline=False)
    losses = LossStep(run.layout, counts, 0.0)
    run.engine.evaluate(losses, iter([microbatch]), 1, sequence_length=run.sequence_length, micro_batch_size=2)
    return float(losses.means()[0])


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents, so that kept apart they mask a different number of targets on every rank."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "short.jsonl"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "rains"]
    lines = [{"text": " ".join(draw.choices(words, k=draw.choice((2, 5, 30))))} for _ in range(800)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def overrides(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (
        "precision=fp32",
        f"data.phases=[{{blend:[{{path:'{documents}'}}]}}]",
        "data.reset_at_document=true",
        "data.validation_fraction=0",
        f"data.cache={tmp_path_factory.mktemp('cache')}",
        "model.router_aux_loss=0.01",
        "optimizer.learning_rate=1e-3",
    )


@pytest.fixture(scope="module")
def single(overrides: tuple[str, ...], _pool: Any) -> list[dict[str, float]]:
    ((metrics, _),) = _pool.run(1, train, overrides, timeout=300)
    return metrics


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_layout_gives_the_losses_of_one_rank(name: str, overrides: Any, single: Any, ranks: Any) -> None:
    world, extra = (LAYOUTS | SLOW)[name]
    for metrics, differing in ranks(world)(train, (*overrides, *extra), timeout=200):
        assert differing == []
        for key in ("loss/lm", "loss/mtp_1", "loss/mtp_2"):
            for step, (ours, theirs) in enumerate(zip(metrics, single, strict=True)):
                assert abs(ours[key] - theirs[key]) <= 2e-6, f"{key} of step {step}: {ours[key]} instead of {theirs[key]}"
        assert metrics[-1]["one microbatch"] == pytest.approx(single[-1]["one microbatch"], rel=2e-6)
        assert metrics[-1]["loss/lm"] < metrics[0]["loss/lm"] - 0.5  # it learned, so agreement means something
        assert metrics[-1]["moe/aux_loss"] == pytest.approx(single[-1]["moe/aux_loss"], rel=2e-6)
        assert [m["moe/max_violation"] for m in metrics] == [m["moe/max_violation"] for m in single]
        for ours, theirs in zip(metrics, single, strict=True):
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-6)


QUANTISED = (
    "precision=nvfp4",
    "precision.amax_scope=tensor_parallel",
    "model.pattern=M*-M/M",
    "model.ffn_hidden_size=64",
)


@pytest.mark.slow
def test_split_sequences_give_the_losses_of_one_rank_in_nvfp4(overrides: Any, ranks: Any) -> None:
    """With amaxes over whole tensors every operand has the values and the random bits it has on one rank (routed experts apart, whose tokens come
    in another order)."""
    ((single, _),) = ranks(1)(train, (*overrides, *QUANTISED), timeout=200)
    ((exact, _),) = ranks(1)(train, (*overrides, *QUANTISED, "precision=fp32"), timeout=200)
    for metrics, differing in ranks(2)(train, (*overrides, *QUANTISED, "parallel.context=2"), timeout=200):
        assert differing == []
        for key in ("loss/lm", "loss/mtp_1", "grad_norm"):
            assert metrics[0][key] == pytest.approx(single[0][key], rel=2e-6)
            assert abs(exact[0]["grad_norm"] - single[0]["grad_norm"]) > 1e-4  # it was quantised
