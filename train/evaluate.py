"""Evaluation: the LM loss over the whole validation text, in fixed windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from train.step import LossStep, to_microbatch

if TYPE_CHECKING:
    from train.loop import Run


def evaluate(run: Run, step: int) -> float | None:
    """Mean LM loss in nats per validation token, the same on every rank; None without validation text.

    Windows are dealt out to the data-parallel ranks in turn; ranks that run out of them go on with masked ones, because every rank must take
    part in every collective.
    """
    batches = run.data.validation_batches(run.recipe.train.micro_batch_size)
    if not batches:
        return None
    layout = run.layout
    mine = batches[layout.data_rank :: layout.data_size]
    progress = min(step / run.recipe.total_steps, 1.0)
    microbatches = [to_microbatch(batch, layout.device, progress) for batch in mine]
    counts = torch.tensor([sum(int(batch.loss_mask.sum()) for batch in batches)], device=layout.device)
    rounds = -(-len(batches) // layout.data_size)
    if len(mine) < rounds:
        spare = to_microbatch(batches[0], layout.device, progress)
        spare = type(spare)(**{**spare.__dict__, "loss_mask": torch.zeros_like(spare.loss_mask)})
        microbatches += [spare] * (rounds - len(mine))
    losses = LossStep(layout, torch.cat((counts, counts.new_ones(run.recipe.model.mtp_depths))), 0.0)
    run.engine.evaluate(
        losses,
        microbatches,
        sequence_length=run.recipe.train.sequence_length,
        micro_batch_size=run.recipe.train.micro_batch_size,
    )
    return float(losses.means()[0])
