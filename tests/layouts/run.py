"""What is trained: a small model with every kind of layer, two MTP depths and short documents, on ranks of the pool."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.router import Router
from parallel import groups
from parallel.replicas import differing_replicas
from tests.train.recipes import recipe
from train import loop
from train.build import Run
from train.checkpoint.boxes import Box
from train.checkpoint.state import model_parts
from train.step import LossStep, sum_over_ranks, to_microbatch
from train.train_step import train_step

STEPS = 20
STARVED = 1  # the expert that gets no tokens
NEVER = -1000.0  # a bias that no score, between 0 and 1, outweighs


@dataclass(frozen=True)
class Held:
    """What a rank holds of the tensor `name` of this global shape, as fp32."""

    name: str
    shape: tuple[int, ...]
    box: Box
    values: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """Of a run, on one rank. metrics: of every step. evaluated: the LM loss of one microbatch behind the last one. differing: tensors of which two
    ranks hold other bits. parts: weights and expert biases at the end. margin: of a run on one rank, the least by which a token preferred an expert
    that it chose to one that it did not."""

    metrics: list[dict[str, float]]
    evaluated: float
    differing: list[str]
    parts: list[Held]
    margin: float


def train(rank: int, overrides: Sequence[str], starved: bool = False, steps: int = STEPS) -> Outcome:
    """Trains so many steps. starved: one expert of every layer gets no token at all."""
    made = loop.build(recipe(*overrides, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    try:
        if starved:
            starve(made.chunks)
        margins = Margins(made.chunks if made.layout.world_size == 1 else ())
        metrics = [train_step(made, step) for step in range(steps)]
        made.engine.settle()
        parts = [Held(part.name, part.shape, part.box, part.tensor.float().numpy(force=True).copy()) for part in model_parts(made.chunks)]
        return Outcome(metrics, evaluated(made), differing_replicas(*made.chunks), parts, margins.least)
    finally:
        groups.shutdown(leave_world=False)


def starve(chunks: Sequence[nn.Module]) -> None:
    """Takes all tokens from the expert STARVED of every layer, and sees that it stays so."""

    def check(router: nn.Module, given: Any, out: tuple[Tensor, Tensor]) -> None:
        assert not out[1][:, STARVED].any(), "the expert that was to starve got a token"

    for router in routers(chunks):
        with torch.no_grad():
            router.bias[STARVED] = NEVER
        router.register_forward_hook(check)


class Margins:
    """Sees by how little tokens choose their experts. Scores are about 1e-7 from those of another layout: where a choice hangs on less, a token goes
    another way, its experts' loads change by one, and with them, by the sign of a difference, an expert's bias."""

    def __init__(self, chunks: Sequence[nn.Module]):
        self.least = float("inf")
        for router in routers(chunks):
            router.gate.register_forward_hook(partial(self._look, router))

    def _look(self, router: Router, gate: nn.Module, given: Any, logits: Tensor) -> None:
        best = (logits.detach().sigmoid() + router.bias).topk(router.top_k + 1).values
        self.least = min(self.least, (best[..., -2] - best[..., -1]).min().item())


def routers(chunks: Sequence[nn.Module]) -> Iterator[Router]:
    """Of this rank."""
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, Router))


def evaluated(run: Run) -> float:
    """The LM loss of one microbatch, on every data-parallel rank the same."""
    microbatch = to_microbatch(run.data.batch([0, 1], STEPS), run.layout, 0.0, run.mtp_depths)
    counts = sum_over_ranks(microbatch.loss_counts(), run.layout, pipeline=False)
    losses = LossStep(run.layout, counts, 0.0)
    run.engine.evaluate(losses, iter([microbatch]), 1, sequence_length=run.sequence_length, micro_batch_size=2)
    return float(losses.means()[0])


def write_documents(path: Path) -> None:
    """Short documents, so that kept apart they mask a different number of targets on every rank."""
    draw = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "rains"]
    lines = [{"text": " ".join(draw.choices(words, k=draw.choice((2, 5, 30))))} for _ in range(800)]
    path.write_text("\n".join(map(json.dumps, lines)))


def given(place: Path) -> tuple[str, ...]:
    """The overrides of every run; its documents and their tokens lie in `place`."""
    place.mkdir(parents=True, exist_ok=True)
    documents = place / "short.jsonl"
    if not documents.exists():
        write_documents(documents)
    return (
        "precision=fp32",
        f"data.phases=[{{blend:[{{path:'{documents}'}}]}}]",
        "data.reset_at_document=true",
        "data.validation_fraction=0",
        f"data.cache={place / 'cache'}",
        "model.router_aux_loss=0.01",
        "optimizer.learning_rate=1e-3",
    )
