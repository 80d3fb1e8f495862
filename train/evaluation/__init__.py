"""What is measured on a model beside its training loss: evaluators behind one interface.

A new one is a frozen dataclass in a file of its own, whose fields are its keys in the recipe (`evaluation.<name>.<field>`), and one call of
`register_evaluator`.
"""

from train.evaluation.base import Evaluator, Measured, register_evaluator
from train.evaluation.chosen import EvaluationConfig, measure

__all__ = ["EvaluationConfig", "Evaluator", "Measured", "measure", "register_evaluator"]
