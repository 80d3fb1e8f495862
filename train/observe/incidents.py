"""incidents.jsonl: what a person should have known at once, one JSON object a line, kept over every restart.

{"time": "2026-11-25T10:00:00+00:00", "step": 57, "kind": "checkpoint", "severe": false, "text": "..."}
"""

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from train.observe.base import Alert, Observer, RunInfo

FILE_NAME = "incidents.jsonl"


class IncidentsFile(Observer):
    """Appends to <run>/incidents.jsonl; there is no file until there is something to say."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def on_start(self, run: RunInfo) -> None:
        self._path = run.run_dir / FILE_NAME

    def on_alert(self, alert: Alert) -> None:
        self._write(alert.step, alert.kind, alert.severe, alert.text)

    def on_skipped(self, step: int, grad_norm: float) -> None:
        self._write(step, "skipped", False, f"step {step} was not taken: loss or gradients are not finite (gradient norm {grad_norm})")

    def on_rewind(self, step: int, to: int) -> None:
        self._write(step, "rewind", True, f"went back from step {step} to the checkpoint of step {to}")

    def _write(self, step: int, kind: str, severe: bool, text: str) -> None:
        if self._path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry: dict[str, Any] = {"time": now, "step": step, "kind": kind, "severe": severe, "text": text}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_incidents(run_dir: Path) -> list[dict[str, Any]]:
    """The incidents of a run, oldest first; lines that are none, such as one torn by a kill, are left out."""
    try:
        lines = (run_dir / FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found
