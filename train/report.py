"""Pictures of runs: `python -m train.report runs=[runs/a,runs/b]`."""

from __future__ import annotations

from pathlib import Path


def draw_loss_curve(run_dir: Path, baseline: float | None = None) -> Path:
    """Draws <run>/report/loss.png and returns its path."""
    raise ValueError(f"{run_dir}: not drawn")
