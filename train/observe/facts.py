"""report/facts.json: the few numbers of a run that metrics.jsonl does not hold and a report wants."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.observe.base import Observer, RunInfo

FILE_NAME = "report/facts.json"


class FactsFile(Observer):
    """Writes <run>/report/facts.json: parameters at the start, the baseline once it is known."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._facts: dict[str, Any] = {}

    def on_start(self, run: RunInfo) -> None:
        self._path = run.run_dir / FILE_NAME
        self._facts = {
            "parameters": run.parameters,
            "active_parameters": run.active_parameters,
            "total_steps": run.total_steps,
            "tokens_per_step": run.tokens_per_step,
            "layers": list(run.layers),
        }
        self._write()

    def on_end(self, summary: Mapping[str, Any]) -> None:
        if summary.get("baseline/trigram") is not None:
            self._facts["baseline/trigram"] = float(summary["baseline/trigram"])
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(self._path.name + ".new")
        temporary.write_text(json.dumps(self._facts, indent=1) + "\n")
        os.replace(temporary, self._path)


def read_facts(run_dir: Path) -> dict[str, Any]:
    """The facts of a run; empty when it has none (a run of another program, a damaged file)."""
    try:
        facts = json.loads((run_dir / FILE_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
