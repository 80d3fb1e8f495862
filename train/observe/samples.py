"""samples.jsonl: the texts a model made while it was trained, one JSON object a line, of one series with rising steps as metrics.jsonl is.

{"step": 240, "prompt": "It is a truth", "text": " of the house ...", "ended": "length"}
"""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.observe.base import Metrics, Observer, RunInfo
from train.observe.sample_settings import Sample

FILE_NAME = "samples.jsonl"


class SamplesFile(Observer):
    """Appends to <run>/samples.jsonl; there is no file until there is a text."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def on_start(self, run: RunInfo) -> None:
        self._path = run.run_dir / FILE_NAME
        self._keep(run.step)

    def on_rewind(self, step: int, to: int) -> None:
        self._keep(to)

    def on_samples(self, metrics: Metrics, samples: Sequence[Sample]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(_line({"step": metrics["step"], **asdict(sample)}) for sample in samples)

    def _keep(self, step: int) -> None:
        """Leaves the texts of the steps up to this one."""
        if self._path is not None and self._path.exists():
            kept = [row for row in read_samples(self._path.parent) if row["step"] <= step]
            temporary = self._path.with_name(FILE_NAME + ".new")
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
            os.replace(temporary, self._path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The texts of a run, in the order in which they were made; lines that are none, such as one torn by a kill, are left out."""
    try:
        lines = (run_dir / FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and {"prompt", "text", "ended"} <= row.keys():
                found.append(row)
    return found
