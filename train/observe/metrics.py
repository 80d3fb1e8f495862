"""metrics.jsonl: one JSON object per step, the record every picture and test of a run is made from.

Each line is written and flushed whole, so a killed run loses at most the line being written. An evaluation joins the
line of its step. JSON has no NaN or infinity: a non-finite number is written as the string "NaN", "Infinity" or
"-Infinity", which `float` reads back. A run resumed at step s, or gone back to it, keeps the lines up to s and drops the rest: the file
is always one series with rising steps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from train.observe.base import Metrics, Observer, RunInfo

FILE_NAME = "metrics.jsonl"


def encode_line(metrics: Mapping[str, Any]) -> bytes:
    """One line of the file, newline included."""
    return (json.dumps({key: _valid(value) for key, value in metrics.items()}, allow_nan=False) + "\n").encode()


def _valid(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode_lines(content: bytes) -> list[dict[str, Any]]:
    """The objects of a metrics file, non-finite numbers restored; a torn last line is left out.

    Raises ValueError when a line other than the last is not a JSON object with a `step`.
    """
    lines = content.split(b"\n")
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError("no step")
        except (ValueError, RecursionError):
            if number == len(lines):  # no newline after it: the writer was killed in the middle
                break
            raise ValueError(f"line {number} is not a JSON object with a whole-number step") from None
        objects.append({key: _number(value) for key, value in entry.items()})
    return objects


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, oldest first.

    Raises ValueError, in one sentence, when the file is missing, empty or damaged.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the directory of a run that has logged a step")
    try:
        entries = decode_lines(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore the file or leave this run out") from None
    if not entries:
        raise ValueError(f"{path} is empty: wait until the run has logged a step, or leave it out")
    return entries


class MetricsFile(Observer):
    """Writes <run>/metrics.jsonl."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._last: dict[str, Any] = {}
        self._last_offset = 0

    def on_start(self, run: RunInfo) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        path = run.run_dir / FILE_NAME
        self._path = path
        self._keep(path, run.step)

    def _keep(self, path: Path, step: int) -> None:
        kept: list[dict[str, Any]] = []
        if path.exists():
            try:
                entries = decode_lines(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}): restore or remove it before resuming") from None
            kept = [entry for entry in entries if entry["step"] <= step]
        lines = [encode_line(entry) for entry in kept]
        temporary = path.with_name(path.name + ".new")
        with temporary.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = path.open("r+b", buffering=0)
        self._file.seek(0, os.SEEK_END)
        self._last = kept[-1] if kept else {}
        self._last_offset = self._file.tell() - (len(lines[-1]) if lines else 0)

    def on_rewind(self, step: int, to: int) -> None:
        """Drops the lines after step `to`."""
        if self._path is not None:
            self.close()
            self._keep(self._path, to)

    def on_step(self, metrics: Metrics) -> None:
        self._write(metrics)

    def on_evaluation(self, metrics: Metrics) -> None:
        self._write(metrics)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.close()  # whole before pictures are drawn from it

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, metrics: Metrics) -> None:
        if self._file is None:
            raise RuntimeError("MetricsFile was not started: call on_start first")
        entry = dict(metrics)
        if self._last.get("step") == entry["step"]:
            entry = {**self._last, **entry}
            self._file.seek(self._last_offset)
        else:
            self._last_offset = self._file.seek(0, os.SEEK_END)
        # One write of the whole line: a merged line is only ever longer than the one it replaces.
        self._file.write(encode_line(entry))
        self._file.truncate()
        self._last = entry
