"""DeepSpeed's engine, by the real package, against Megatron's: losses, the state in checkpoints, and what a step that is not taken leaves behind."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.engine import ModelSizes
from parallel.engines import open_engine
from parallel.groups import initialize, shutdown
from parallel.layout import ParallelConfig
from parallel.replicas import compare_replicas, differing_replicas
from tests.parallel.toy import Toy, batch, train
from tests.train.recipes import recipe
from train import loop
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.reader import open_checkpoint
from train.optimizer import OptimizerConfig, open_optimizer, optimizer_options
from train.train_step import train_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="the package deepspeed is not installed: pip install -c constraints.txt -e '.[deepspeed]'",
    ),
]
STEPS = 20
RECIPE = (
    "precision=fp32",
    "data.validation_fraction=0",
    "model.router_aux_loss=0.01",
    "optimizer.learning_rate=1e-3",
)
ENGINE = "parallel.engine=deepspeed"
STAGE_2, STAGE_3, OFFLOADED = "parallel.zero_stage=2", "parallel.zero_stage=3", "parallel.offload_optimizer=true"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "data": (2, ()),
    "data, ZeRO-2": (2, (STAGE_2,)),
    "data, offloaded": (2, (OFFLOADED,)),
    "data, ZeRO-2, offloaded": (2, (STAGE_2, OFFLOADED)),
    "data, recomputed": (2, ("parallel.recompute=[norm,head,layer]",)),
    "data, ZeRO-2, recomputed": (2, (STAGE_2, "parallel.recompute=[norm,activation,moe,head,mamba]")),
    "data, ZeRO-3": (2, (STAGE_3,)),
    "data, ZeRO-3, offloaded": (2, (STAGE_3, OFFLOADED)),
    "data, ZeRO-3, recomputed": (2, (STAGE_3, "parallel.recompute=[norm,activation,moe,head,mamba]")),
    "data, ZeRO-3, layers recomputed": (2, (STAGE_3, "parallel.recompute=[norm,head,layer]")),
    "tensor": (2, ("parallel.tensor=2",)),
    "expert": (2, ("parallel.expert=2",)),
    "expert, ZeRO-2": (2, ("parallel.expert=2", STAGE_2)),
    "tensor, experts whole, ZeRO-2": (2, ("parallel.tensor=2", "parallel.expert_tensor=1", STAGE_2)),
    "expert tensor": (2, ("parallel.expert_tensor=2",)),
    "tensor x expert": (4, ("parallel.tensor=2", "parallel.expert=2")),
    "tensor x data, ZeRO-2, offloaded": (4, ("parallel.tensor=2", STAGE_2, OFFLOADED)),
}


def run(rank: int, overrides: tuple[str, ...]) -> tuple[list[dict[str, float]], list[str]]:
    """Metrics of STEPS steps, and what differs between replicas at the end."""
    made = loop.build(recipe(*overrides, world_size=int(os.environ["WORLD_SIZE"])))
    try:
        metrics = [train_step(made, step) for step in range(STEPS)]
        made.engine.settle()
        mismatches = compare_replicas(made.chunks, made.engine.parameter_states(), made.layout)
        return metrics, differing_replicas(*made.chunks) + [mismatch.sentence() for mismatch in mismatches]
    finally:
        made.engine.close()
        shutdown(leave_world=False)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*RECIPE, f"data.cache={tmp_path_factory.mktemp('cache')}")


@pytest.fixture(scope="module")
def megatron(given: tuple[str, ...], _pool: Any) -> list[dict[str, float]]:
    ((metrics, _),) = _pool.run(1, run, given, timeout=600)
    return metrics


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_megatron_on_one_rank(name: str, given: Any, megatron: Any, ranks: Any) -> None:
    world, layout = LAYOUTS[name]
    for metrics, differing in ranks(world)(run, (*given, ENGINE, *layout), timeout=600):
        assert differing == []
        assert metrics[-1]["loss/lm"] < metrics[0]["loss/lm"] - 0.3
        for step, (ours, theirs) in enumerate(zip(metrics, megatron, strict=True)):
            for key in ("loss/lm", "loss/mtp_1", "loss/mtp_2", "grad_norm", "moe/aux_loss", "moe/max_violation"):
                assert ours[key] == pytest.approx(theirs[key], rel=2e-6), f"{key} of step {step}"


def resume(
    rank: int, directory: str, engine_name: str, config: ParallelConfig, save_at: int | None, name: str, clip: float
) -> tuple[list[float], Tensor]:
    """Trains from the newest checkpoint (or the start) to step 6, saving at `save_at`: (losses, all weights)."""
    layout = initialize(config, seed=0)
    try:
        model = Toy(torch.float32)
        options = {key: kind() for key, kind in optimizer_options().items()}
        optimizer = open_optimizer(OptimizerConfig(1e-2, name, clip=clip, options=options))
        engine = open_engine(engine_name, [model], layout, ModelSizes(torch.float32, hidden_size=8), optimizer)
        checkpointer = Checkpointer(directory, engine, [model])
        checkpoint = checkpointer.load_newest()
        start = 0 if checkpoint is None else checkpoint.step
        losses = []
        if save_at is not None:
            losses += train(engine, layout, range(start, save_at))
            checkpointer.save(save_at, {})
            start = save_at
        losses += train(engine, layout, range(start, 6))
        engine.settle()
        engine.close()
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])
    finally:
        shutdown(leave_world=False)


PLAIN, SPLIT = ParallelConfig(), ParallelConfig(distributed_optimizer=True)
KINDS = [ParallelConfig(engine="deepspeed", zero_stage=stage, offload_optimizer=off) for stage in (1, 2, 3) for off in (False, True)]


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.zero_stage} {kind.offload_optimizer}")
def test_checkpoints_go_from_engine_to_engine(ranks: Any, tmp_path: Path, kind: ParallelConfig, name: str) -> None:
    """Saved by either on two ranks, continued by the other on one and on two: the losses of the run that was not stopped."""
    (losses, weights), *_ = ranks(1)(resume, str(tmp_path / "whole"), "megatron", PLAIN, None, name, 0.05, timeout=600)
    for first, second in (
        (("megatron", SPLIT), ("deepspeed", kind)),
        (("deepspeed", kind), ("megatron", SPLIT)),
        (("deepspeed", kind),) * 2,
    ):
        directory = str(tmp_path / f"{first[0]} {second[0]}")
        ranks(2)(resume, directory, *first, 3, name, 0.05, timeout=600)
        state = {"adamw": {"exp_avg", "exp_avg_sq"}, "lion": {"exp_avg"}}[name]
        assert {stored.split("/")[0] for stored in open_checkpoint(directory).names()} == {"model", "step", *state}
        for world in (2, 1):
            for resumed, final in ranks(world)(resume, directory, *second, None, name, 0.05, timeout=600):
                assert resumed == pytest.approx(losses[3:], rel=2e-6)
                torch.testing.assert_close(final, weights, rtol=0, atol=2e-6)


def objecting(rank: int, config: ParallelConfig, poisoned: bool) -> tuple[list[float], list[float], bool]:
    """A step that rank 1 objects to, or whose gradient is not finite there, between two that are taken: losses of the latter, those of a run
    without it, and whether it was taken."""
    layout = initialize(config, seed=0)
    try:
        runs = []
        taken = True
        for disturbed in (True, False):
            model = Toy(torch.float32)
            engine = open_engine(
                "deepspeed", [model], layout, ModelSizes(torch.float32, hidden_size=8), open_optimizer(OptimizerConfig(1e-2))
            )
            losses = train(engine, layout, range(1))
            if disturbed:

                def step(microbatches: Any, chunk: Any) -> Any:
                    factor = float("nan") if poisoned and layout.rank == 1 else 1.0
                    return chunk(next(microbatches)), lambda output: (output * factor, None, {})

                mine = list(batch(7)[2 * layout.data_rank :][:2])
                sizes = {"sequence_length": 2, "micro_batch_size": 1, "learning_rate": 1e-2}
                taken = engine.train_step(step, mine, agreed=lambda: poisoned or layout.rank == 0, **sizes).taken  # type: ignore[arg-type]
            runs.append(losses + train(engine, layout, range(1, 4)))
            engine.close()
        return runs[0], runs[1], taken
    finally:
        shutdown(leave_world=False)


@pytest.mark.parametrize("poisoned", [False, True], ids=["objected to", "not finite"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.zero_stage} {kind.offload_optimizer}")
def test_a_step_that_is_not_taken_leaves_nothing_behind(ranks: Any, kind: ParallelConfig, poisoned: bool) -> None:
    for disturbed, undisturbed, taken in ranks(2)(objecting, kind, poisoned, timeout=600):
        assert not taken and disturbed == undisturbed
