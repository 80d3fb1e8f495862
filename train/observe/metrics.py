"""metrics.jsonl: one JSON object per step, the record every picture and test of a run is made from.

Each line is written and flushed whole, so a killed run loses at most the line being written. An evaluation joins the
line of its step. JSON has no NaN or infinity: a non-finite number is written as the string "NaN", "Infinity" or
"-Infinity", which `float` reads back. A run resumed at step s keeps the lines up to s and drops the rest, and so does
one that goes back to a checkpoint: the file is always one series with rising steps.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from train.observe.base import Metrics, Observer, RunInfo
from train.observe.sample_settings import Sample

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
    """Writes <run>/metrics.jsonl.

    A line that could not be written whole (a full disk) leaves the file as it was and is kept, with those that follow: the next moment tries
    again, so that the series has no hole when there is room again.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        self._rows: list[dict[str, Any]] = []  # the last one, which an evaluation may join, behind those that could not be written yet
        self._written = b""  # what the file holds of them
        self._start = 0  # where they begin
        self._remembered: list[dict[str, Any]] = []  # of the checkpoint the run goes on from

    def on_start(self, run: RunInfo) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        path = self._path = run.run_dir / FILE_NAME
        kept: list[dict[str, Any]] = []
        if path.exists():
            try:
                entries = decode_lines(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}): restore or remove it before resuming") from None
            kept = [entry for entry in entries if entry["step"] <= run.step]
        known = {entry["step"] for entry in kept}
        self._begin_with([*kept, *(row for row in self._remembered if row["step"] <= run.step and row["step"] not in known)])

    def state(self) -> dict[str, Any]:
        """The last line, which is torn where the writer is killed while an evaluation joins it, and those that wait for room on the disk: the step of
        the checkpoint is not taken again, so nothing else would bring them back."""
        return {"lines": [encode_line(row).decode() for row in self._rows]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._remembered = decode_lines("".join(state.get("lines", ())).encode())

    def on_rewind(self, step: int, to: int) -> None:
        if self._path is not None:
            waiting = [row for row in self._rows if row["step"] <= to]
            self.close()
            before = [entry for entry in decode_lines(self._path.read_bytes()) if entry["step"] <= to]
            known = {entry["step"] for entry in before}
            self._begin_with([*before, *(row for row in waiting if row["step"] not in known)])

    def _begin_with(self, kept: Sequence[dict[str, Any]]) -> None:
        """Goes on behind these lines, which alone stay in the file."""
        assert self._path is not None
        path = self._path
        lines = [encode_line(entry) for entry in kept]
        temporary = path.with_name(path.name + ".new")
        with temporary.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = path.open("r+b", buffering=0)
        self._rows = list(kept[-1:])
        self._written = b"".join(lines[-1:])
        self._start = path.stat().st_size - len(self._written)

    def on_step(self, metrics: Metrics) -> None:
        self._write(metrics)

    def on_evaluation(self, metrics: Metrics) -> None:
        self._write(metrics)

    def on_samples(self, metrics: Metrics, samples: Sequence[Sample]) -> None:
        self._write(metrics)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.close()  # whole before pictures are drawn from it

    def close(self) -> None:
        if self._file is not None:
            try:
                self._flush()
            finally:
                self._file.close()
                self._file = None

    def _write(self, metrics: Metrics) -> None:
        if self._file is None:
            raise RuntimeError("MetricsFile was not started: call on_start first")
        if self._rows and self._rows[-1]["step"] == metrics["step"]:
            self._rows[-1] = {**self._rows[-1], **metrics}
        else:
            self._rows.append(dict(metrics))
        self._flush()

    def _flush(self) -> None:
        """Writes what waits; raises OSError, and leaves the file as it was, where it does not fit."""
        lines = [encode_line(row) for row in self._rows]
        content = b"".join(lines)
        if content != self._written:
            try:
                same = len(self._written) if content.startswith(self._written) else 0
                self._put(content, same)
            except OSError:
                with contextlib.suppress(OSError):
                    self._put(self._written)  # its blocks are taken already
                raise
        self._rows, self._written = self._rows[-1:], b"".join(lines[-1:])
        self._start += len(content) - len(self._written)

    def _put(self, content: bytes, done: int = 0) -> None:
        """Makes this the end of the file, of which `done` bytes are there; one write, where the system takes it whole."""
        assert self._file is not None
        self._file.seek(self._start + done)
        while done < len(content):
            done += self._file.write(content[done:])
        self._file.truncate()
