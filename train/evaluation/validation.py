"""Evaluation: the LM loss over the whole validation text, in fixed windows.

python -m train.evaluate checkpoint=runs/tiny          # a run, or one checkpoint of it
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from model.batch import Microbatch
from train.build import Run
from train.step import LossStep, to_microbatch


def evaluate(run: Run, step: int) -> float | None:
    """Mean LM loss in nats per validation token, the same on every rank; None without validation text.

    Windows are dealt out to the data-parallel ranks in turn; ranks that run out of them go on with masked ones, because every rank must take
    part in every collective.
    """
    batches = run.data.validation_batches(run.recipe.micro_batch_size)
    if not batches:
        return None
    layout, depths = run.layout, run.recipe.model.mtp_depths
    progress = min(step / run.recipe.total_steps, 1.0)
    rounds = -(-len(batches) // layout.data_size)

    def microbatches() -> Iterator[Microbatch]:
        for place in range(layout.data_rank, rounds * layout.data_size, layout.data_size):
            microbatch = to_microbatch(batches[min(place, len(batches) - 1)], layout.device, progress, depths)
            masked = torch.zeros_like(microbatch.loss_mask)
            yield microbatch if place < len(batches) else replace(microbatch, loss_mask=masked)

    counts = torch.tensor([run.data.validation_tokens, *[1] * depths], device=layout.device)
    losses = LossStep(layout, counts, 0.0)
    run.engine.evaluate(
        losses,
        microbatches(),
        rounds,
        sequence_length=run.recipe.train.sequence_length,
        micro_batch_size=run.recipe.micro_batch_size,
    )
    return float(losses.means()[0])
