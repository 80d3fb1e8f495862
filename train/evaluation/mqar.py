"""Multi-query associative recall (`data.mqar`): how many of the keys a model is asked for it answers with their value."""

from dataclasses import dataclass

from data.documents import DataError
from data.hashing import digest
from data.mqar import MQAR
from data.text_data import TextData
from train.evaluation.answers import answers
from train.evaluation.base import Evaluator, Measured, register_evaluator


@dataclass(frozen=True)
class Recall(Evaluator):
    """mqar/<length>x<pairs>: the share of queries answered right, chance being 2 / (number of ids).

    The sequences depend on length, pairs, the number of ids and their number alone, so all runs are asked the same; none is one of training.
    """

    tasks: tuple[str, ...] = ("64x4", "128x8", "256x16", "512x64")
    """Lengths and pairs of the sequences, as LENGTHxPAIRS."""
    examples: int = 200
    """Sequences of each."""

    def check(self, data: TextData, sequence_length: int) -> None:
        if not self.tasks or self.examples < 1:
            raise ValueError(f"evaluation.mqar has {len(self.tasks)} tasks of {self.examples} examples: give at least one of each")
        for index, name in enumerate(self.tasks):
            try:
                MQAR.of(f"mqar:{name}", data.tokenizer.vocab_size)
            except DataError as error:
                raise ValueError(f"evaluation.mqar.tasks[{index}]={name!r} cannot be asked: {error}") from None

    def evaluate(self, run: Measured, step: int) -> dict[str, float]:
        found = {}
        for name in self.tasks:
            task = MQAR.of(f"mqar:{name}", run.data.tokenizer.vocab_size)
            keys = [digest("mqar, evaluation", task, index) for index in range(self.examples)]
            found[f"mqar/{name}"] = answers(run, step, [task.draw(key, task.length) for key in keys]).accuracy
        return found


register_evaluator("mqar", Recall)
