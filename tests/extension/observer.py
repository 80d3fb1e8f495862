"""An observer that keeps a diary in the run directory, and counts in the checkpoint how many steps it has seen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.observe.base import Metrics, MonitorConfig, Observer, RunInfo, register_observer

FILE_NAME = "diary.txt"


class Diary(Observer):
    def __init__(self) -> None:
        self._path: Path | None = None
        self.seen = 0

    def on_start(self, run: RunInfo) -> None:
        self._path = run.run_dir / FILE_NAME
        self._write(f"start after step {run.step}, having seen {self.seen}")

    def on_step(self, metrics: Metrics) -> None:
        self.seen += 1

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._write(f"end after step {summary['step']}, having seen {self.seen}")

    def on_error(self, error: BaseException) -> None:
        self._write(f"failed: {error}")

    def close(self) -> None:
        self._write("closed")

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seen = int(state.get("seen", 0))

    def _write(self, line: str) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def make(config: MonitorConfig) -> Observer:
    return Diary()


def register() -> None:
    register_observer("diary", make)
