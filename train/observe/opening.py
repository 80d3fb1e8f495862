"""Which observers a recipe asks for, and one object that speaks to all of them and lets none of them do harm."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.checkpoint.remote import Location
from train.observe.base import OBSERVERS, Alert, Metrics, MonitorConfig, Observer, RunInfo
from train.observe.console import Console
from train.observe.facts import FactsFile
from train.observe.incidents import IncidentsFile
from train.observe.metrics import MetricsFile
from train.observe.picture import LossPicture
from train.observe.profiler import Profiler
from train.observe.sample_settings import Sample
from train.observe.samples import SamplesFile
from train.observe.tensorboard_observer import TensorBoard
from train.observe.wandb_observer import WandbObserver


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Observers(Observer):
    """Passes each moment to every observer in order; their states are kept under their class names.

    An observer that raises is reported in one line, and the others hear of the moment all the same. One that cannot even start is left out
    from then on; any other is told of the next moment as usual, because a disk that was full may have room again, and the same complaint is
    said once until it works again. `close` reaches every observer, once. say: receives the lines.
    """

    def __init__(self, observers: Sequence[Observer], say: Callable[[str], None] = _to_stderr) -> None:
        self.observers = tuple(observers)
        self._say = say
        self._silent: set[Observer] = set()
        self._failing: dict[Observer, dict[str, str]] = {}  # by moment, why
        self._closed = False

    def on_start(self, run: RunInfo) -> None:
        self._tell("on_start", lambda observer: observer.on_start(run))

    def on_step_begin(self, step: int) -> None:
        self._tell("on_step_begin", lambda observer: observer.on_step_begin(step))

    def on_formats(self, step: int, precision_table: str) -> None:
        self._tell("on_formats", lambda observer: observer.on_formats(step, precision_table))

    def on_step(self, metrics: Metrics) -> None:
        self._tell("on_step", lambda observer: observer.on_step(metrics))

    def on_skipped(self, step: int, grad_norm: float) -> None:
        self._tell("on_skipped", lambda observer: observer.on_skipped(step, grad_norm))

    def on_alert(self, alert: Alert) -> None:
        self._tell("on_alert", lambda observer: observer.on_alert(alert))

    def on_rewind(self, step: int, to: int) -> None:
        self._tell("on_rewind", lambda observer: observer.on_rewind(step, to))

    def on_evaluation(self, metrics: Metrics) -> None:
        self._tell("on_evaluation", lambda observer: observer.on_evaluation(metrics))

    def on_samples(self, metrics: Metrics, samples: Sequence[Sample]) -> None:
        self._tell("on_samples", lambda observer: observer.on_samples(metrics, samples))

    def on_checkpoint(self, step: int, path: Location) -> None:
        self._tell("on_checkpoint", lambda observer: observer.on_checkpoint(step, path))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._tell("on_end", lambda observer: observer.on_end(summary))

    def on_error(self, error: BaseException) -> None:
        self._tell("on_error", lambda observer: observer.on_error(error))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._silent.clear()
            self._tell("close", lambda observer: observer.close())

    def state(self) -> dict[str, Any]:
        states: dict[str, Any] = {}

        def collect(observer: Observer) -> None:
            if state := observer.state():
                states[type(observer).__name__] = state

        self._tell("state", collect)
        return states

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._tell("load_state", lambda observer: observer.load_state(state.get(type(observer).__name__, {})))

    def _tell(self, moment: str, hook: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            if observer in self._silent:
                continue
            try:
                hook(observer)
            except Exception as error:
                if moment == "on_start":
                    self._silent.add(observer)
                self._report(observer, moment, error)
            else:
                self._failing.get(observer, {}).pop(moment, None)

    def _report(self, observer: Observer, moment: str, error: Exception) -> None:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        consequence = "the run goes on without it" if moment == "on_start" else "the run goes on"
        line = f"observer {type(observer).__name__} failed in {moment} ({type(error).__name__}: {reason}): {consequence}"
        failing = self._failing.setdefault(observer, {})
        known = reason in failing.values()
        failing[moment] = reason
        if known:
            return
        try:
            self._say(line)
        except Exception:  # the console may be the one that fails
            with contextlib.suppress(Exception):
                _to_stderr(line)


def open_observers(config: MonitorConfig, draw: Callable[[Path], Path], draw_report: Callable[[Path], Path] | None = None) -> Observers:
    """The observers of one run; call on rank 0 only (other ranks use `Observers(())`). draw: see `LossPicture`; draw_report: see `WandbObserver`.

    Texts are written before the row of their step, with which W&B is sent them. Then the order is that of the last moment: the metrics file is
    complete before the picture is drawn from it, W&B is sent both, and the console speaks last.
    """
    picture = LossPicture(draw) if config.picture else None
    console = Console(picture)
    chosen: list[Observer] = [SamplesFile(), MetricsFile(), FactsFile(), IncidentsFile()]
    if config.tensorboard:
        chosen.append(TensorBoard())
    if config.profile.steps:
        chosen.append(Profiler(config.profile, say=console.say))
    chosen += [OBSERVERS[name](config) for name in config.observers]
    if picture is not None:
        picture.say = console.say
        chosen.append(picture)
    if config.wandb != "disabled":
        chosen.append(WandbObserver(config, console.say, draw_report))
    chosen.append(console)
    return Observers(chosen, say=console.say)
