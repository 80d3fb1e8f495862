"""A small model's parts on this rank, for the tests of this room."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model.batch import Microbatch
from model.config import ModelConfig
from model.context import ModelContext
from model.precision.policy import Policy, PrecisionConfig
from parallel import groups
from parallel.layout import ParallelConfig

CONFIG = ModelConfig.of(
    pattern="M*-",
    vocab_size=64,
    hidden_size=32,
    attention_heads=4,
    key_value_heads=2,
    head_dim=16,
    mamba_heads=8,
    mamba_head_dim=16,
    mamba_state_size=16,
    mamba_groups=2,
    ffn_hidden_size=64,
    init_std=0.1,
)


@contextmanager
def open_context(
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
    *,
    config: ModelConfig = CONFIG,
    precision: PrecisionConfig = PrecisionConfig(default="fp32"),  # noqa: B008 (frozen)
    seed: int = 5,
    device: str = "cpu",
) -> Iterator[ModelContext]:
    """Joins a layout for the time of a `with` block."""
    layout = groups.initialize(parallel, seed)
    try:
        policy = Policy(precision, len(config.layers))
        yield ModelContext(config, layout, policy, seed, torch.float32, torch.device(device))
    finally:
        groups.shutdown(leave_world="WORLD_SIZE" not in os.environ)  # a pool of ranks keeps its world


def microbatch(length: int, batch: int = 2, *, documents: torch.Tensor | None = None, depths: int = 2, **given: Any) -> Microbatch:
    """Random tokens; documents: int32 [batch, length], kept apart when given; `given` replaces arguments of `Microbatch.of`."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(CONFIG.vocab_size, (batch, length + 1), generator=generator)
    whole: dict[str, Any] = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(batch, length, dtype=torch.bool),
        "documents": torch.zeros(batch, length, dtype=torch.int32) if documents is None else documents,
        "reset": documents is not None,
        "sample": torch.arange(batch) + 7,
        "step": 3,
    }
    return Microbatch.of(**(whole | given), depths=depths)


def packed(length: int, batch: int = 2) -> torch.Tensor:
    """int32 [batch, length]: documents of several lengths, one token and chunk boundaries included."""
    starts = torch.zeros(batch, length, dtype=torch.int32)
    starts[0, [1, 2, length // 2]] = 1
    starts[-1, [3, 64 % length, length - 1]] = 1
    return starts.cumsum(1).int()


def disturb(module: torch.nn.Module, seed: int = 0) -> None:
    """Moves every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.1)
