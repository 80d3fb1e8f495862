"""The real engine, saved by one kind of data parallelism and resumed by another."""

import pytest
import torch
from torch import Tensor

from parallel.engine import ModelSizes
from parallel.engines import open_engine
from parallel.groups import initialize, shutdown
from parallel.layout import ParallelConfig
from tests.parallel.toy import Toy, train
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.reader import open_checkpoint
from train.optimizer import OptimizerConfig, open_optimizer, optimizer_options


def run(
    rank: int, directory: str, sharded: bool, dtype: torch.dtype, save_at: int | None, name: str = "adamw", clip: float = 1.0
) -> tuple[list[float], Tensor]:
    """Trains from the newest checkpoint (or the start) to step 6, saving at `save_at`: (losses, all weights)."""
    config = ParallelConfig(distributed_optimizer=sharded)
    layout = initialize(config, seed=0)
    try:
        model = Toy(dtype)
        optimizer = open_optimizer(
            OptimizerConfig(1e-2, name, clip=clip, options={key: kind() for key, kind in optimizer_options().items()})
        )
        engine = open_engine("megatron", [model], layout, ModelSizes(dtype, hidden_size=8), optimizer)
        checkpointer = Checkpointer(directory, engine, [model])
        checkpoint = checkpointer.load_newest()
        start = 0 if checkpoint is None else checkpoint.step
        losses = []
        if save_at is not None:
            losses += train(engine, layout, range(start, save_at))
            checkpointer.save(save_at, {})
            start = save_at
        losses += train(engine, layout, range(start, 6))
        return losses, torch.cat([p.detach().float().flatten() for p in model.parameters()])
    finally:
        shutdown(leave_world=False)


TENSORS = {"adamw": ["exp_avg", "exp_avg_sq"], "lion": ["exp_avg"]}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_optimizer_state_moves_between_data_parallel_layouts(ranks, tmp_path, dtype, name):
    """Masters and state of 2 ranks with the distributed optimizer serve 1 rank, 2 ranks without it, and back."""
    for source_ranks, source_sharded in ((2, True), (1, False)):
        directory = str(tmp_path / f"{source_ranks}")
        (losses, weights), *_ = ranks(source_ranks)(run, directory, source_sharded, dtype, 3, name)
        checkpoint = open_checkpoint(directory)
        kinds = {stored.split("/")[0] for stored in checkpoint.names()}
        assert kinds == {"model", "step", *TENSORS[name]} | ({"master"} if dtype == torch.bfloat16 else set())
        assert len(checkpoint.names("exp_avg")) == len(checkpoint.names("model")) == 6
        assert len(checkpoint.names("master")) == (6 if dtype == torch.bfloat16 else 0)
        assert int(checkpoint.read_full("step")) == 3
        for target_ranks, target_sharded in ((2, True), (2, False), (1, False)):
            for resumed, final in ranks(target_ranks)(run, directory, target_sharded, dtype, None, name):
                if (target_ranks, target_sharded) == (source_ranks, source_sharded):
                    assert resumed == losses[3:] and torch.equal(final, weights)
                else:
                    assert resumed == pytest.approx(losses[3:], rel=1e-6)
                    torch.testing.assert_close(final, weights, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_run_saved_by_the_other_kind_is_the_uninterrupted_one(ranks, tmp_path, sharded, name):
    """Bit for bit on 2 ranks, where no gradient is clipped: both kinds then add and multiply the same numbers in the same order."""
    (losses, weights), *_ = ranks(2)(run, str(tmp_path / "uninterrupted"), sharded, torch.float32, None, name, 1e6)
    ranks(2)(run, str(tmp_path / "saved"), not sharded, torch.float32, 3, name, 1e6)
    for resumed, final in ranks(2)(run, str(tmp_path / "saved"), sharded, torch.float32, None, name, 1e6):
        assert resumed == losses[3:] and torch.equal(final, weights)


def save_again(rank: int, source: str, target: str, sharded: bool, name: str) -> None:
    """Loads the newest checkpoint of one run and saves it in another."""
    layout = initialize(ParallelConfig(distributed_optimizer=sharded), seed=0)
    try:
        model = Toy(torch.bfloat16)
        optimizer = open_optimizer(OptimizerConfig(1e-2, name, options={key: kind() for key, kind in optimizer_options().items()}))
        engine = open_engine("megatron", [model], layout, ModelSizes(torch.bfloat16, hidden_size=8), optimizer)
        assert Checkpointer(source, engine, [model]).load_newest() is not None
        Checkpointer(target, engine, [model]).save(3, {})
    finally:
        shutdown(leave_world=False)


@pytest.mark.parametrize("name", TENSORS)
def test_state_is_bit_for_bit_the_same_on_another_layout(ranks, tmp_path, name):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    ranks(2)(run, first, True, torch.bfloat16, 3, name)
    ranks(2)(save_again, first, second, False, name)
    old, new = open_checkpoint(first), open_checkpoint(second)
    assert old.names() == new.names() and any(stored.startswith("master/") for stored in old.names())
    for tensor in old.names():
        assert torch.equal(old.read_full(tensor), new.read_full(tensor)), tensor
