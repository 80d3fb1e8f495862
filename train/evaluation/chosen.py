"""The recipe's `evaluation` group: which evaluators measure a run, and the keys of each."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from train.evaluation import acceptance, mqar, needle, validation  # noqa: F401  registers them
from train.evaluation.base import EVALUATORS, Evaluator, Measured


def _registered() -> Mapping[str, type[Evaluator]]:
    return EVALUATORS


@dataclass(frozen=True)
class EvaluationConfig:
    """The recipe's `evaluation` group."""

    evaluators: tuple[str, ...] = ("validation",)
    """What is measured, in this order, every train.eval_every steps and at the end, by the names `register_evaluator` knows."""
    known: dict[str, Evaluator] = field(
        default_factory=lambda: {name: evaluator() for name, evaluator in EVALUATORS.items()}, metadata={"kinds": _registered}
    )
    """Every registered evaluator with its keys."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for an evaluator nobody registered."""
        for index, name in enumerate(self.evaluators):
            key = f"evaluation.evaluators[{index}]={name!r}"
            if name not in EVALUATORS:
                raise ValueError(f"{key} is unknown: use one of {', '.join(EVALUATORS)}, or register it with register_evaluator")
            if name in self.evaluators[:index]:
                raise ValueError(f"{key} is named twice: leave one out")

    def chosen(self) -> dict[str, Evaluator]:
        """The evaluators of this run by name, in the order in which they measure."""
        return {name: self.known[name] for name in self.evaluators}


def measure(run: Measured, evaluators: Mapping[str, Evaluator], step: int) -> dict[str, float]:
    """What every evaluator says after `step` steps, {metric: value}; collective, the same on every rank but for seconds/evaluation/<name>, which
    each of several took. An error names the evaluator that raised it.
    """
    run.engine.settle()
    metrics: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        begin = time.perf_counter()
        try:
            measured = evaluator.evaluate(run, step)
        except Exception as error:
            error.add_note(f"in the evaluator {name!r}, after step {step}")
            raise
        if twice := metrics.keys() & measured.keys():
            raise ValueError(f"evaluator {name!r} gives {min(twice)}, which another evaluator gives too: rename one of them")
        metrics |= measured
        if len(evaluators) > 1:
            metrics[f"seconds/evaluation/{name}"] = time.perf_counter() - begin
    return metrics
