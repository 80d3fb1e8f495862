"""TensorBoard: read back with the package itself, the same numbers at the same steps, one curve over a resume."""

import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.observe.examples import metrics_of, run_info
from train.observe import MonitorConfig
from train.observe.tensorboard_observer import TensorBoard


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_the_same_numbers_at_the_same_steps_and_one_curve_after_a_resume(tmp_path: Path) -> None:
    first = TensorBoard()
    first.on_start(run_info(tmp_path, recipe={"run": {"name": "unit"}, "hub": {"password": "hunter22"}}))
    for step in range(1, 8):  # killed after step 7, its checkpoint is that of step 5
        first.on_step(metrics_of(step, loss=100.0 + step))
    first.close()
    second = TensorBoard()
    second.on_start(run_info(tmp_path, step=5))
    for step in range(6, 11):
        second.on_step(metrics_of(step, loss=200.0 + step))
    second.on_evaluation({"step": 10, "tokens": 20480, "eval/loss": 1.5, "eval/bits_per_byte": 2.16})
    second.on_end({})
    second.close()

    events = read(tmp_path / "tensorboard")
    losses = [(event.step, event.value) for event in events.Scalars("loss/lm")]
    assert losses == [(step, 100.0 + step) for step in range(1, 6)] + [(step, 200.0 + step) for step in range(6, 11)]
    assert set(events.Tags()["scalars"]) == set(metrics_of(1)) - {"step"} | {"eval/loss", "eval/bits_per_byte"}
    assert [(event.step, event.value) for event in events.Scalars("eval/bits_per_byte")] == [(10, pytest.approx(2.16))]
    assert all(b"hunter22" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_without_the_package_it_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    MonitorConfig(tensorboard=True).validate()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    MonitorConfig().validate()
    with pytest.raises(ValueError, match=r"monitor\.tensorboard=true needs .* pip install -c constraints.txt -e '\.\[tensorboard\]'"):
        MonitorConfig(tensorboard=True).validate()
