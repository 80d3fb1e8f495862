"""Which observers a recipe asks for, and one object that speaks to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.observe.base import Metrics, MonitorConfig, Observer, RunInfo
from train.observe.console import Console
from train.observe.facts import FactsFile
from train.observe.metrics import MetricsFile
from train.observe.picture import LossPicture
from train.observe.profiler import Profiler
from train.observe.tensorboard_observer import TensorBoard
from train.observe.wandb_observer import WandbObserver


class Observers(Observer):
    """Passes each moment to every observer in order; their states are kept under their class names."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = tuple(observers)

    def on_start(self, run: RunInfo) -> None:
        for observer in self.observers:
            observer.on_start(run)

    def on_step_begin(self, step: int) -> None:
        for observer in self.observers:
            observer.on_step_begin(step)

    def on_formats(self, step: int, precision_table: str) -> None:
        for observer in self.observers:
            observer.on_formats(step, precision_table)

    def on_step(self, metrics: Metrics) -> None:
        for observer in self.observers:
            observer.on_step(metrics)

    def on_skipped(self, step: int, grad_norm: float) -> None:
        for observer in self.observers:
            observer.on_skipped(step, grad_norm)

    def on_evaluation(self, metrics: Metrics) -> None:
        for observer in self.observers:
            observer.on_evaluation(metrics)

    def on_checkpoint(self, step: int, path: Path) -> None:
        for observer in self.observers:
            observer.on_checkpoint(step, path)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer.on_end(summary)

    def state(self) -> dict[str, Any]:
        return {type(observer).__name__: state for observer in self.observers if (state := observer.state())}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer.load_state(state.get(type(observer).__name__, {}))


def open_observers(config: MonitorConfig) -> Observers:
    """The observers of one run; call on rank 0 only (other ranks use `Observers(())`).

    The order is that of the last moment: the metrics file is complete before the picture is drawn from it, and the
    console speaks last.
    """
    picture = LossPicture() if config.picture else None
    console = Console(picture)
    chosen: list[Observer] = [MetricsFile(), FactsFile()]
    if config.wandb != "disabled":
        chosen.append(WandbObserver(config, say=console.say))
    if config.tensorboard:
        chosen.append(TensorBoard())
    if config.profile.steps:
        chosen.append(Profiler(config.profile, say=console.say))
    if picture is not None:
        picture.say = console.say
        chosen.append(picture)
    chosen.append(console)
    return Observers(chosen)
