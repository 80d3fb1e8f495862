"""The metrics of a run that must be the same bits whenever it is repeated, killed or resumed: all but those that tell of the machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.observe.metrics import read_metrics

OF_THE_MACHINE = ("step_seconds", "tokens_per_second", "memory_peak_bytes", "mfu", "seconds/", "goodput/", "ranks/")
"""Beginnings of the names of times, speeds and sizes of processes."""


def numbers_in(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of one line of metrics.jsonl."""
    return {key: value for key, value in entry.items() if not key.startswith(OF_THE_MACHINE)}


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """Of each line of metrics.jsonl, in the order of the file."""
    return [numbers_in(entry) for entry in read_metrics(run_dir)]
