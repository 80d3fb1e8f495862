"""What tests tell an observer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.observe import RunInfo

RECIPE = {
    "run": {"name": "unit", "seed": 7},
    "model": {"pattern": "ME*E/*E", "hidden_size": 64, "latent_size": None},
    "precision": {"default": "nvfp4", "rules": [{"module": "lm_head", "format": "bf16"}]},
}


def run_info(run_dir: Path, step: int = 0, total: int = 10, **changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "recipe": RECIPE,
        "run_dir": run_dir,
        "parameters": 1_234_567,
        "active_parameters": 1_000_000,
        "step": step,
        "total_steps": total,
        "tokens_per_step": 2048,
        "resumed": step > 0,
    }
    return RunInfo(**{**values, **changes})


def metrics_of(step: int, loss: float | None = None) -> dict[str, float | int]:
    return {
        "step": step,
        "tokens": step * 2048,
        "loss/lm": 5.0 / step if loss is None else loss,
        "loss/mtp_1": 5.5 / step,
        "loss/mtp_2": 6.0 / step,
        "grad_norm": 0.5,
        "learning_rate": 4e-3,
        "tokens_per_second": 12_345.6,
        "step_seconds": 0.166,
        "mfu": 0.176,
    }
