"""An evaluator: the loss of the first windows of the validation text alone, a quick look."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.batch import Microbatch
from train.evaluation.base import Evaluator, Measured, register_evaluator
from train.step import LossStep, to_microbatch


@dataclass(frozen=True)
class FirstWindows(Evaluator):
    batches: int = 1
    """Batches of windows that are looked at, by every data-parallel rank the same."""

    def evaluate(self, run: Measured, step: int) -> dict[str, float]:
        held = run.data.validation_batches(run.micro_batch_size)
        count = min(self.batches, len(held))
        seen = [held[i] for i in range(count)]
        tokens = sum(int(batch.loss_mask.sum()) for batch in seen) * run.layout.data_size

        def microbatches() -> Iterator[Microbatch]:
            for batch in seen:
                yield to_microbatch(batch, run.layout, run.progress(step), run.mtp_depths)

        losses = LossStep(run.layout, torch.tensor([tokens, *[1] * run.mtp_depths], device=run.layout.device), 0.0)
        run.engine.evaluate(losses, microbatches(), count, sequence_length=run.sequence_length, micro_batch_size=run.micro_batch_size)
        return {"eval/first_windows": float(losses.means()[0])}


def register() -> None:
    register_evaluator("first_windows", FirstWindows)
