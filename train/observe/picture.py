"""The picture a run leaves when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.observe.base import Observer, RunInfo


class LossPicture(Observer):
    """Draws <run>/report/loss.png when the run ends; `path` is then where it lies (None when it could not be drawn)."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.path: Path | None = None
        self.say = say
        self._run_dir: Path | None = None

    def on_start(self, run: RunInfo) -> None:
        self._run_dir = run.run_dir

    def on_end(self, summary: Mapping[str, Any]) -> None:
        if self._run_dir is None:
            return
        from train.report.report import draw_loss_curve  # here: matplotlib takes a second that only the end should pay

        try:
            self.path = draw_loss_curve(self._run_dir)
        except (ValueError, OSError) as error:  # a run that ended before its first logged step; a full disk
            self.say(f"The loss curves were not drawn: {error}")
