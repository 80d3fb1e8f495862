"""The LM loss over the whole validation text, in fixed windows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from model.batch import Microbatch
from train.evaluation.base import Evaluator, Measured, register_evaluator
from train.step import LossStep, to_microbatch


@dataclass(frozen=True)
class ValidationLoss(Evaluator):
    """eval/loss: nats per token; eval/bits_per_byte: the same in bits per byte of text, which compares tokenizers; absent where the text's
    bytes are unknown. Nothing without validation text.

    Windows are dealt out to the data-parallel replicas in turn; those that run out of them go on with masked ones, because every rank must take
    part in every collective.
    """

    def evaluate(self, run: Measured, step: int) -> dict[str, float]:
        batches = run.data.validation_batches(run.micro_batch_size)
        if not batches:
            return {}
        layout, progress = run.layout, run.progress(step)
        rounds = -(-len(batches) // layout.data_size)

        def microbatches() -> Iterator[Microbatch]:
            for place in range(layout.data_rank, rounds * layout.data_size, layout.data_size):
                microbatch = to_microbatch(batches[min(place, len(batches) - 1)], layout, progress, run.mtp_depths)
                masked = torch.zeros_like(microbatch.loss_mask)
                yield microbatch if place < len(batches) else replace(microbatch, loss_mask=masked)

        counts = torch.tensor([run.data.validation_tokens, *[1] * run.mtp_depths], device=layout.device)
        losses = LossStep(layout, counts, 0.0)
        run.engine.evaluate(losses, microbatches(), rounds, sequence_length=run.sequence_length, micro_batch_size=run.micro_batch_size)
        loss = float(losses.means()[0])
        bytes_per_token = run.data.bytes_per_token
        return {"eval/loss": loss} | ({"eval/bits_per_byte": loss / math.log(2) / bytes_per_token} if bytes_per_token else {})


register_evaluator("validation", ValidationLoss)
