"""One optimizer step of a whole run: batches -> loss -> gradients -> update, and the metrics that tell of it."""

import torch

from model.hybrid import end_step, weight_changes
from train.build import Run
from train.optimizer import learning_rate
from train.step import LossStep, sum_over_ranks, to_microbatch
from train.timing import Stopwatch


def train_step(run: Run, step: int, clock: Stopwatch | None = None) -> dict[str, float]:
    """Optimizer step `step` (from 0); its metrics, the same on every rank. `taken` is 0 when its loss or gradients were not
    finite: weights, optimizer state and expert biases are then what they were.

    clock: is told of the phases of the step (see `train.timing`).
    """
    recipe, layout = run.recipe, run.layout
    clock = clock or Stopwatch(layout.device)
    progress = step / recipe.total_steps
    depths = recipe.model.mtp_depths
    targets = run.recipe.model.head_at_targets
    microbatches = [to_microbatch(run.data.batch(s, step), layout, progress, depths, targets=targets) for s in run.plan.samples(step)]
    clock.mark("data")
    counts = sum_over_ranks(torch.stack([m.loss_counts() for m in microbatches]).sum(0), layout, pipeline=False)
    losses = LossStep(layout, counts, recipe.model.mtp_loss_scale)
    rate = learning_rate(recipe.optimizer, step, recipe.total_steps, recipe.tokens_per_step)
    measured = recipe.monitor.quantization.due(step + 1)
    if measured:
        run.context.health.start()
    clock.mark("other")
    result = run.engine.train_step(
        losses,
        microbatches,
        sequence_length=recipe.train.sequence_length,
        micro_batch_size=recipe.micro_batch_size,
        learning_rate=rate,
        mark=clock.mark,
        agreed=losses.finite,
    )
    if result.taken:
        run.engine.update_masters(weight_changes(run.chunks, step, progress))
    moe = end_step(run.chunks, update=result.taken)
    means = losses.means().tolist()
    metrics = {"loss/lm": means[0]}
    metrics |= {f"loss/mtp_{depth}": value for depth, value in enumerate(means[1:], start=1)}
    total = means[0] + moe.get("moe/aux_loss", 0.0)
    if depths:
        total += recipe.model.mtp_loss_scale * sum(means[1:]) / depths
    metrics |= {"loss/total": total, "grad_norm": result.grad_norm, "learning_rate": rate, **moe}
    if measured:
        metrics |= run.context.health.finish()
    metrics["taken"] = float(result.taken)
    return metrics
