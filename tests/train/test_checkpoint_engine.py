"""The real engine, saved by one kind of data parallelism and resumed by another."""

import pytest
import torch
from torch import Tensor, nn

from parallel.engine import Engine, ModelSizes
from parallel.engines import open_engine
from parallel.groups import initialize, shutdown
from parallel.layout import Layout, ParallelConfig
from parallel.shards import Piece, set_pieces
from parallel.stage import Stage
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.reader import open_checkpoint
from train.optimizer import OptimizerConfig, open_optimizer, optimizer_options

SAMPLES = 4  # of a global batch, each a microbatch


class Toy(Stage):
    """Sizes that make flat shards end within rows, within experts and between the tensors of a fused parameter."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.fused = nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype))
        set_pieces(self.fused, [Piece("q", (4, 5), (0, 0), (slice(0, 4),)), Piece("k", (3, 5), (0, 0), (slice(4, 7),))])
        self.experts = nn.Parameter(torch.randn(3, 3, 7, generator=generator).to(dtype))
        set_pieces(self.experts, [Piece(f"experts.{e}.up", (3, 7), (0, 0), (e,)) for e in range(3)])
        self.norm = nn.Parameter(torch.ones(5, dtype=dtype))
        set_pieces(self.norm, [Piece("norm", (5,), (0,), ())])

    def forward(self, microbatch: Tensor, input: Tensor | None = None) -> Tensor:
        x = microbatch
        hidden = (x * self.norm.float()) @ self.fused.float().t()
        return torch.einsum("bf,ehf->beh", hidden, self.experts.float()).tanh().square().sum() / (SAMPLES * len(x))


def train(engine: Engine, layout: Layout, steps: range) -> list[float]:
    """Loss of each step over the global batch."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        samples = torch.randn(SAMPLES, 2, 5, generator=generator)
        mine = SAMPLES // layout.data_size
        total = torch.zeros(())

        def forward_step(microbatches, model, total=total):
            def loss(output):
                total.add_(output.detach())
                return output.clone(), torch.ones((), dtype=torch.int32), {}

            return model(next(microbatches)), loss

        engine.train_step(
            forward_step,
            list(samples[layout.data_rank * mine :][:mine]),
            sequence_length=2,
            micro_batch_size=1,
            learning_rate=1e-2,
        )
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses


def run(
    rank: int, directory: str, sharded: bool, dtype: torch.dtype, save_at: int | None, name: str = "adamw"
) -> tuple[list[float], Tensor]:
    """Trains from the newest checkpoint (or the start) to step 6, saving at `save_at`: (losses, all weights)."""
    config = ParallelConfig(distributed_optimizer=sharded)
    layout = initialize(config, seed=0)
    try:
        model = Toy(dtype)
        optimizer = open_optimizer(OptimizerConfig(1e-2, name, options={key: kind() for key, kind in optimizer_options().items()}))
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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
