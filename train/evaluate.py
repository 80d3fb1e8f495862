"""Evaluation: the LM loss over the whole validation text, in fixed windows.

python -m train.evaluate checkpoint=runs/tiny          # a run, or one checkpoint of it
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from model.batch import Microbatch
from parallel import layout as layouts
from train.arguments import key_values
from train.build import Run, build
from train.checkpoint.reader import open_checkpoint
from train.checkpoint.run import load_weights
from train.export import stored_recipe
from train.recipe import read_recipe
from train.step import LossStep, to_microbatch


def evaluate(run: Run, step: int) -> float | None:
    """Mean LM loss in nats per validation token, the same on every rank; None without validation text.

    Windows are dealt out to the data-parallel ranks in turn; ranks that run out of them go on with masked ones, because every rank must take
    part in every collective.
    """
    batches = run.data.validation_batches(run.recipe.train.micro_batch_size)
    if not batches:
        return None
    layout = run.layout
    progress = min(step / run.recipe.total_steps, 1.0)
    rounds = -(-len(batches) // layout.data_size)

    def microbatches() -> Iterator[Microbatch]:
        for place in range(layout.data_rank, rounds * layout.data_size, layout.data_size):
            microbatch = to_microbatch(batches[min(place, len(batches) - 1)], layout.device, progress)
            masked = torch.zeros_like(microbatch.loss_mask)
            yield microbatch if place < len(batches) else replace(microbatch, loss_mask=masked)

    counts = torch.tensor([run.data.validation_tokens, *[1] * run.recipe.model.mtp_depths], device=layout.device)
    losses = LossStep(layout, counts, 0.0)
    run.engine.evaluate(
        losses,
        microbatches(),
        rounds,
        sequence_length=run.recipe.train.sequence_length,
        micro_batch_size=run.recipe.train.micro_batch_size,
    )
    return float(losses.means()[0])


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        values = key_values(arguments, ("checkpoint",))
        if not isinstance(values.get("checkpoint"), str):
            raise ValueError("checkpoint=... is missing: python -m train.evaluate checkpoint=runs/tiny")
        checkpoint = open_checkpoint(values["checkpoint"])
        run = build(read_recipe(stored_recipe(checkpoint), layouts.world_size()))
        load_weights(checkpoint, run.model)
        loss = evaluate(run, checkpoint.step)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        layouts.shutdown()
    if run.layout.rank == 0:
        print(f"{checkpoint.path}: " + ("no validation text" if loss is None else f"validation loss {loss:.4f} nats per token"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
