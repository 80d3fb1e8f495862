"""Watches over the metrics of every step: spikes of loss and gradient norm, and what drifts away slowly.

Spikes are told by robust statistics, on a log scale. A step is compared with the median of the LEVEL steps before it, which follows a curve that
falls; of the last `window` such differences, the median is what is usual and the median absolute deviation (times 1.4826, which makes it a standard
deviation where the noise is normal) its spread. A difference more than `monitor.incidents.spike` of those above the usual one is a spike; a quiet
curve's deviation counts as at least FLOOR, so a spike of the loss is at least 22 % and one of the gradient norm at least a factor 2.7 by
default. Falling is no spike. Nothing is judged before LEAST differences. One alert is raised when a value leaves, and no other until it is back.

The others compare the median of the last steps with a threshold of the recipe; the share of zero gradients is judged whenever it is measured.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.observe.base import Alert, Metrics
from train.observe.incident_settings import IncidentsConfig

FLOOR = {"loss/lm": 0.02, "grad_norm": 0.1}  # of the deviation, in units of the natural logarithm
LEAST = 30  # differences
LEVEL = 20  # steps
SPIKE = "spike"
ZERO = "/wgrad/zero"


@dataclass(frozen=True)
class Drift:
    """The median of `key` (divided by `over`, when named) must not exceed `limit`."""

    kind: str
    key: str
    over: str | None
    limit: float
    meaning: str

    def value(self, metrics: Metrics) -> float | None:
        if self.key not in metrics or (self.over is not None and not metrics.get(self.over)):
            return None
        return float(metrics[self.key]) / (1.0 if self.over is None else float(metrics[self.over]))


def drifts(config: IncidentsConfig, worst_violation: float | None) -> tuple[Drift, ...]:
    """worst_violation: experts / top_k, when every token goes to the same experts; None without experts."""
    found = [Drift("mtp", "loss/mtp_2", "loss/mtp_1", config.mtp_ratio, "the second MTP depth diverges from the first")]
    if worst_violation is not None:
        limit = min(config.router_violation, 0.95 * worst_violation)
        found.append(Drift("router", "moe/max_violation", None, limit, "one expert is given many times the mean load"))
    return tuple(found)


class Watches:
    """worst_violation: see `drifts`. `look` is told of every step that was taken; the same values and alerts on every rank."""

    def __init__(self, config: IncidentsConfig, worst_violation: float | None = None) -> None:
        self.config = config
        self._drifts = drifts(config, worst_violation)
        self._past: dict[str, list[float]] = {}
        self._differences: dict[str, list[float]] = {}
        self._out: set[str] = set()

    def look(self, step: int, metrics: Metrics) -> list[Alert]:
        """What is wrong since this step."""
        alerts = [alert for key in FLOOR if key in metrics and (alert := self._spike(step, key, float(metrics[key])))]
        alerts += [alert for drift in self._drifts if (alert := self._drift(step, drift, metrics))]
        return alerts + self._zero_gradients(step, metrics)

    def state(self) -> dict[str, Any]:
        return {"past": self._past, "differences": self._differences, "out": sorted(self._out)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for held, name in ((self._past, "past"), (self._differences, "differences")):
            held.clear()
            held.update({key: list(values) for key, values in state.get(name, {}).items()})
        self._out = set(state.get("out", ()))

    def _spike(self, step: int, key: str, value: float) -> Alert | None:
        past, differences = self._past.setdefault(key, []), self._differences.setdefault(key, [])
        log = math.log(max(value, 1e-30))
        alert = None
        if past:
            level = statistics.median(past)
            if len(differences) >= min(LEAST, self.config.window):
                usual = statistics.median(differences)
                deviation = max(1.4826 * statistics.median(abs(other - usual) for other in differences), FLOOR[key])
                score = (log - level - usual) / deviation
                if self._leaves(key, score > self.config.spike):
                    alert = Alert(
                        SPIKE,
                        step,
                        f"{key} is {value:.4g}, {value / math.exp(level):.3g} times the median {math.exp(level):.4g} of the last {len(past)} steps "
                        f"({score:.0f} robust standard deviations)",
                    )
            self._keep(differences, log - level, self.config.window)
        self._keep(past, log, LEVEL)
        return alert

    def _drift(self, step: int, drift: Drift, metrics: Metrics) -> Alert | None:
        value = drift.value(metrics)
        if value is None:
            return None
        past = self._past.setdefault(drift.kind, [])
        self._keep(past, value, self.config.window)
        middle = statistics.median(past)
        if len(past) < self.config.window or not self._leaves(drift.kind, middle > drift.limit):
            return None
        what = drift.key if drift.over is None else f"{drift.key} / {drift.over}"
        return Alert(drift.kind, step, f"{what} is {middle:.3g} (median of {len(past)} steps), above {drift.limit:.3g}: {drift.meaning}")

    def _zero_gradients(self, step: int, metrics: Metrics) -> list[Alert]:
        alerts = []
        for key, value in metrics.items():
            if key.endswith(ZERO) and self._leaves(key, value > self.config.zero_gradients):
                module = key.removeprefix("precision/").removesuffix(ZERO)
                alerts.append(
                    Alert(
                        "zero gradients",
                        step,
                        f"{value:.1%} of the weight gradient of {module} is exactly 0, above {self.config.zero_gradients:.0%}: its format "
                        "underflows, or its experts get no tokens",
                    )
                )
        return alerts

    def _leaves(self, key: str, outside: bool) -> bool:
        """Whether it is outside now, and was not before."""
        was = key in self._out
        (self._out.add if outside else self._out.discard)(key)
        return outside and not was

    @staticmethod
    def _keep(past: list[float], value: float, most: int) -> None:
        past.append(value)
        del past[:-most]
