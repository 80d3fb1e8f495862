"""The watches over metrics: silent on real runs, awake to what is put into them."""

import math
import random
from typing import Any

from train.incidents.spikes import Watches
from train.observe.incident_settings import IncidentsConfig


def noisy(steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """A loss that falls as a power of the step with 5 % of noise, and a gradient norm with 20 %."""
    draw = random.Random(seed)
    return [
        {
            "loss/lm": (1.5 + 4 * step**-0.5) * math.exp(draw.gauss(0, 0.05)),
            "loss/mtp_1": 2.0,
            "loss/mtp_2": 2.02,
            "grad_norm": (0.5 + 5 / step) * math.exp(draw.gauss(0, 0.2)),
            "moe/max_violation": 1 + 2.9 * math.exp(-step / 50),
        }
        for step in range(1, steps + 1)
    ]


def told(watches: Watches, metrics: list[dict[str, Any]], first: int = 1) -> list[tuple[int, str]]:
    return [(alert.step, alert.kind) for step, m in enumerate(metrics, first) for alert in watches.look(step, m)]


def test_a_run_like_any_other_raises_no_alert() -> None:
    for seed in range(5):
        assert told(Watches(IncidentsConfig(), 4.0), noisy(1000, seed)) == []


def test_a_spike_is_told_while_the_loss_still_falls_steeply() -> None:
    for seed in range(5):
        for step, factor in ((40, 3.5), (100, 3.0), (300, 2.5), (900, 2.5)):
            metrics = noisy(1000, seed)
            metrics[step - 1]["loss/lm"] *= factor
            assert told(Watches(IncidentsConfig(), 4.0), metrics) == [(step, "spike")]


def test_each_thing_that_is_put_in_is_told_once() -> None:
    metrics = noisy(600)
    for step in (300, 301, 302):
        metrics[step - 1]["loss/lm"] *= 3
    metrics[399]["grad_norm"] *= 20
    for m in metrics[420:]:
        m["loss/mtp_2"] = 2.6
    for m in metrics[450:]:
        m["moe/max_violation"] = 3.95
    metrics[499]["precision/layers.1.mixer.in_proj/wgrad/zero"] = 0.95
    assert told(Watches(IncidentsConfig(), 4.0), metrics) == [
        (300, "spike"),
        (400, "spike"),
        (471, "mtp"),
        (500, "zero gradients"),
        (501, "router"),
    ]


def test_what_was_seen_survives_a_resume() -> None:
    metrics = noisy(400)
    metrics[319]["loss/lm"] *= 3
    metrics[320]["loss/lm"] *= 3
    whole = Watches(IncidentsConfig())
    before, after = Watches(IncidentsConfig()), Watches(IncidentsConfig())
    first = told(before, metrics[:320])
    after.load_state(before.state())
    assert first + told(after, metrics[320:], 321) == told(whole, metrics) == [(320, "spike")]
    assert after.state() == whole.state()
