"""Multi-query associative recall (`data.mqar`): how many of the keys a model is asked for it answers with their value."""

from dataclasses import dataclass

from data.hashing import digest
from data.mqar import MQAR
from train.evaluation.answers import answers
from train.evaluation.base import Measured, register_evaluator


@dataclass(frozen=True)
class Recall:
    """mqar/<length>x<pairs>: the share of queries answered right, chance being 2 / (number of ids).

    The sequences depend on length, pairs, the number of ids and their number alone, so all runs are asked the same; none is one of training.
    """

    tasks: tuple[str, ...] = ("64x4", "128x8", "256x16", "512x64")
    """Lengths and pairs of the sequences, as LENGTHxPAIRS."""
    examples: int = 200
    """Sequences of each."""

    def evaluate(self, run: Measured, step: int) -> dict[str, float]:
        found = {}
        for name in self.tasks:
            task = MQAR.of(f"mqar:{name}", run.data.tokenizer.vocab_size)
            keys = [digest("mqar, evaluation", task, index) for index in range(self.examples)]
            found[f"mqar/{name}"] = answers(run, step, [task.draw(key, task.length) for key in keys]).accuracy
        return found


register_evaluator("mqar", Recall)
