"""What an evaluator is, what it sees of a run, and how it becomes known by name."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Protocol

from torch import nn

from data.text_data import TextData
from parallel.engine import ForwardStep
from parallel.layout import Layout


class Forward(Protocol):
    """What an evaluator needs of the engine."""

    def evaluate(
        self, forward_step: ForwardStep, microbatches: Iterator[Any], count: int, *, sequence_length: int, micro_batch_size: int
    ) -> None:
        """Forward passes alone over `count` microbatches, the same number on every rank; results are left in `forward_step`."""

    def settle(self) -> None:
        """Makes the weights on this rank those of the last step (see `parallel.engine.Stateful`)."""


class Measured(Protocol):
    """A run as an evaluator sees it, on this rank; `train.build.Run` is one."""

    @property
    def layout(self) -> Layout: ...

    @property
    def data(self) -> TextData: ...

    @property
    def chunks(self) -> Sequence[nn.Module]:
        """This rank's parts of the model."""

    @property
    def engine(self) -> Forward: ...

    @property
    def sequence_length(self) -> int: ...

    @property
    def micro_batch_size(self) -> int: ...

    @property
    def mtp_depths(self) -> int: ...

    def progress(self, step: int) -> float:
        """The fraction of the run that is done after `step` steps, in [0, 1]: it decides the formats."""


class Evaluator(ABC):
    """Measures a model. Subclasses are frozen dataclasses: their fields, with defaults, are the keys `evaluation.<name>.<field>` of a recipe."""

    def check(self, data: TextData, sequence_length: int) -> None:  # noqa: B027 (most have nothing to check)
        """Raises ValueError, in one sentence naming key and remedy, for a run it could not measure; called before there is a model."""

    @abstractmethod
    def evaluate(self, run: Measured, step: int) -> Mapping[str, float]:
        """{metric name: value} after `step` steps; empty when there is nothing to measure on.

        Called by every rank at the same time, so it may communicate; every rank returns the same. The model must be left as it was, and
        random numbers of training do not depend on it.
        """


EVALUATORS: dict[str, type[Evaluator]] = {}
"""What `register_evaluator` was told, by name."""


def register_evaluator(name: str, evaluator: type[Evaluator]) -> None:
    """Makes `evaluation.evaluators=[name]` possible; to be called before a recipe is read. Raises ValueError for what cannot be."""
    if name in EVALUATORS or name == "evaluators":
        raise ValueError(f"an evaluator cannot be called {name!r}, because that name is taken: choose another name")
    if not (is_dataclass(evaluator) and issubclass(evaluator, Evaluator)):
        raise ValueError(
            f"the evaluator {name!r} is no dataclass derived from Evaluator: derive it from train.evaluation.Evaluator and decorate it with "
            "@dataclass(frozen=True), its fields are its recipe keys"
        )
    EVALUATORS[name] = evaluator
