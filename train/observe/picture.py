"""The picture a run leaves when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.observe.base import Observer, RunInfo


class LossPicture(Observer):
    """Has the loss curves drawn when the run ends; `path` is then where they lie (None when they could not be drawn).

    draw: the run's directory -> the picture; raises ValueError or OSError where that is not possible.
    """

    def __init__(self, draw: Callable[[Path], Path], say: Callable[[str], None] = print) -> None:
        self._draw = draw
        self.path: Path | None = None
        self.say = say
        self._run_dir: Path | None = None

    def on_start(self, run: RunInfo) -> None:
        self._run_dir = run.run_dir

    def on_end(self, summary: Mapping[str, Any]) -> None:
        if self._run_dir is None:
            return
        try:
            self.path = self._draw(self._run_dir)
        except (ValueError, OSError) as error:  # a run that ended before its first logged step; a full disk
            self.say(f"The loss curves were not drawn: {error}")
