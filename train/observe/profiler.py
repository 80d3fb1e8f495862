"""A window of the run under torch.profiler: `monitor.profile={start: 100, steps: 3}`.

Below <run>/profile, of rank 0:

    steps-100-102.json.gz   every operator and kernel on a time line: open it in ui.perfetto.dev or chrome://tracing
    steps-100-102.txt       the operators that took longest

Outside the window nothing is measured and nothing costs time. Inside, steps are slower, and their step_seconds and mfu are too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from train.observe.base import Metrics, Observer, ProfileConfig, RunInfo

FOLDER = "profile"
_ROWS = 40  # operators in the table


class Profiler(Observer):
    """Profiles the steps of `config`; `say` receives where the trace lies."""

    def __init__(self, config: ProfileConfig, say: Callable[[str], None] = print) -> None:
        self.config = config
        self._say = say
        self._folder = Path()
        self._window: profile | None = None
        self._first = self._step = 0

    def on_start(self, run: RunInfo) -> None:
        self._folder = run.run_dir / FOLDER

    def on_step_begin(self, step: int) -> None:
        self._step = step
        if self._window is not None and step not in self.config:
            self._finish(step - 1)
        elif self._window is None and step in self.config:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._window, self._first = profile(activities=activities), step
            self._window.start()

    def on_step(self, metrics: Metrics) -> None:
        # Where the last step of the window is logged, what follows it (an evaluation, a checkpoint) stays out of the trace.
        if self._window is not None and int(metrics["step"]) + 1 not in self.config:
            self._finish(int(metrics["step"]))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        if self._window is not None:
            self._finish(self._step)

    def _finish(self, last: int) -> None:
        window, self._window = self._window, None
        assert window is not None
        window.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{last}"
        trace = self._folder / f"{name}.json.gz"
        window.export_chrome_trace(str(trace))
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = window.key_averages().table(sort_by=key, row_limit=_ROWS, max_name_column_width=60)
        (self._folder / f"{name}.txt").write_text(table + "\n")
        self._say(f"Profile of steps {self._first} to {last}: {trace}, most expensive operators in {name}.txt")
