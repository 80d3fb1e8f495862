"""A model of three awkward parameters, and steps of an engine around it."""

import torch
from torch import Tensor, nn

from parallel.engine import Engine
from parallel.layout import Layout
from parallel.shards import Piece, set_pieces
from parallel.stage import Stage

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


def batch(step: int) -> Tensor:
    """[samples, 2, 5] of a step."""
    return torch.randn(SAMPLES, 2, 5, generator=torch.Generator().manual_seed(step))


def train(engine: Engine, layout: Layout, steps: range, learning_rate: float = 1e-2) -> list[float]:
    """Loss of each step over the global batch."""
    losses = []
    for step in steps:
        samples = batch(step)
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
            learning_rate=learning_rate,
        )
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses
