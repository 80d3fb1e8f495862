"""The observers together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.observe.examples import metrics_of, run_info
from train.observe import MonitorConfig, Observer, Observers, base, open_observers, opening, register_observer
from train.observe.base import Metrics
from train.report.picture import draw_losses_of


def test_observers_pass_every_moment_in_order_and_keep_states() -> None:
    heard: list[tuple[str, str]] = []

    class First(Observer):
        def on_step(self, metrics: Any) -> None:
            heard.append((type(self).__name__, "step"))

        def on_end(self, summary: Any) -> None:
            heard.append((type(self).__name__, "end"))

        def state(self) -> dict[str, Any]:
            return {"of": type(self).__name__}

        def load_state(self, state: Any) -> None:
            heard.append((type(self).__name__, state.get("of", "nothing")))

    class Second(First):
        pass

    both = Observers([First(), Second()])
    both.on_step({"step": 1})
    both.on_end({})
    assert both.state() == {"First": {"of": "First"}, "Second": {"of": "Second"}}
    both.load_state({"Second": {"of": "Second"}})
    assert heard == [
        ("First", "step"), ("Second", "step"), ("First", "end"), ("Second", "end"),
        ("First", "nothing"), ("Second", "Second"),
    ]  # fmt: skip


def test_a_whole_run_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observers = open_observers(MonitorConfig(wandb="disabled"), draw_losses_of)
    observers.on_start(run_info(tmp_path))
    for step in range(1, 11):
        observers.on_step(metrics_of(step))
    observers.on_evaluation({"step": 10, "tokens": 20480, "eval/loss": 1.8})
    observers.on_end({"step": 10, "eval/loss": 1.8, "baseline/trigram": 1.9})
    assert (tmp_path / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "report" / "loss.png") in capsys.readouterr().out
    assert json.loads((tmp_path / "report" / "facts.json").read_text())["baseline/trigram"] == 1.9
    assert not (tmp_path / "wandb").exists() and not (tmp_path / "wandb_id").exists()


def test_a_run_without_a_logged_step_ends_without_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observers = open_observers(MonitorConfig(wandb="disabled"), draw_losses_of)
    observers.on_start(run_info(tmp_path))
    observers.on_end({"step": 0})
    output = capsys.readouterr().out
    assert "The loss curves were not drawn" in output and f"run directory    {tmp_path}" in output


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"wandb": "on"}, "monitor.wandb='on'"), ({"wandb_project": " "}, "monitor.wandb_project"),
     ({"wandb_timeout_seconds": 0}, "monitor.wandb_timeout_seconds=0")],
)  # fmt: skip
def test_monitor_config_refuses(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        MonitorConfig(**changes).validate()


class Failing(Observer):
    """Raises in one hook; the others count."""

    def __init__(self, moment: str = "") -> None:
        self.moment, self.heard = moment, list[str]()

    def _hear(self, moment: str) -> None:
        self.heard.append(moment)
        if moment == self.moment:
            raise OSError("no space left\non the disk")

    def on_start(self, run: Any) -> None:
        self._hear("on_start")

    def on_step(self, metrics: Any) -> None:
        self._hear("on_step")

    def on_error(self, error: BaseException) -> None:
        self._hear("on_error")

    def close(self) -> None:
        self._hear("close")


@pytest.mark.parametrize("moment", ["on_start", "on_step", "on_error", "close"])
def test_an_observer_that_fails_stops_nobody(moment: str, tmp_path: Path) -> None:
    said: list[str] = []
    failing, other = Failing(moment), Failing()
    observers = Observers([failing, other], said.append)
    observers.on_start(run_info(tmp_path))
    for step in (1, 2, 3):
        observers.on_step(metrics_of(step))
    observers.on_error(ValueError("x"))
    observers.close()
    observers.close()
    assert other.heard == ["on_start", "on_step", "on_step", "on_step", "on_error", "close"]
    assert failing.heard == (["on_start", "close"] if moment == "on_start" else other.heard)
    (line,) = said  # once, however often it failed
    assert line.startswith(f"observer Failing failed in {moment} (OSError: no space left): the run goes on")


def test_registered_observers_are_opened_by_name_and_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "OBSERVERS", {})
    monkeypatch.setattr(opening, "OBSERVERS", base.OBSERVERS)
    register_observer("failing", lambda config: Failing(config.wandb))
    with pytest.raises(ValueError, match="'failing' is registered already"):
        register_observer("failing", lambda config: Failing())
    config = MonitorConfig(wandb="disabled", observers=("failing",))
    config.validate()
    (opened,) = (observer for observer in open_observers(config, draw_losses_of).observers if isinstance(observer, Failing))
    assert opened.moment == "disabled"
    with pytest.raises(ValueError, match=r"monitor.observers\[1\]='failing' is named twice"):
        MonitorConfig(observers=("failing", "failing")).validate()


def test_the_same_complaint_is_said_once_until_it_works_again() -> None:
    class Disk(Observer):
        full = True

        def on_step(self, metrics: Metrics) -> None:
            if self.full:
                raise OSError("No space left on device")

        def on_evaluation(self, metrics: Metrics) -> None:
            self.on_step(metrics)

    said: list[str] = []
    disk = Disk()
    observers = Observers([disk], said.append)
    for full in (True, False, True):
        disk.full = full
        for step in range(1, 4):
            observers.on_step({"step": step})
            observers.on_evaluation({"step": step})
    assert len(said) == 2 and all("No space left on device" in line for line in said)
