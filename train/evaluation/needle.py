"""Needles in a haystack (`data.needle`): how often a model of bytes says what was hidden in a text, on texts of its training length and longer."""

from dataclasses import dataclass

from data.documents import DataError
from data.hashing import digest
from data.needle import KINDS, Needles
from data.text_data import TextData
from data.tokenizer import ByteTokenizer
from train.evaluation.answers import answers
from train.evaluation.base import Evaluator, Measured, register_evaluator


@dataclass(frozen=True)
class Needle(Evaluator):
    """needle/<task>/<bytes>: the share of texts whose needle is said without a mistake, as greedy generation would.

    The texts depend on task, length and number alone, so all runs are asked the same; novels in them are parts that no training text of the task
    has. Sequences longer than train.sequence_length must divide over the ranks that share them, as those do.
    """

    tasks: tuple[str, ...] = tuple(KINDS)
    """RULER's names, see `data.needle`."""
    times: tuple[int, ...] = (1, 2, 4, 8)
    """Lengths of the texts, in train.sequence_length."""
    examples: int = 50
    """Texts of each task and length."""

    def check(self, data: TextData, sequence_length: int) -> None:
        if not isinstance(data.tokenizer, ByteTokenizer):
            raise ValueError("evaluation.evaluators names needle, whose texts are bytes: leave it out, or set data.tokenizer.kind=bytes")
        if not (self.tasks and self.times) or min(self.examples, *self.times) < 1:
            raise ValueError(
                f"evaluation.needle has tasks={list(self.tasks)}, times={list(self.times)} and examples={self.examples}: give at least one of each"
            )
        for name in self.tasks:
            try:
                for times in (min(self.times), max(self.times)):
                    Needles.of(f"ruler:{name}", held=True).draw(0, times * sequence_length)
            except DataError as error:
                raise ValueError(
                    f"evaluation.needle cannot ask at train.sequence_length={sequence_length} and evaluation.needle.times={list(self.times)}: {error}"
                ) from None

    def evaluate(self, run: Measured, step: int) -> dict[str, float]:
        found = {}
        for name in self.tasks:
            task = Needles.of(f"ruler:{name}", held=True)
            for length in (times * run.sequence_length for times in self.times):
                samples = [task.draw(digest("needle, evaluation", name, length, index), length) for index in range(self.examples)]
                found[f"needle/{name}/{length}"] = answers(run, step, samples).exact
        return found


register_evaluator("needle", Needle)
