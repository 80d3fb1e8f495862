"""Synthetic run directories for the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml


def make_run(directory: Path, steps: int = 60, factor: float = 1.0, recipe: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A synthetic run: losses fall from ln(256), an evaluation every 20 steps."""
    directory.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        loss = factor * (1.3 + 4.2 * math.exp(-step / 8) + 0.02 * math.sin(step))
        entry: dict[str, Any] = {
            "step": step,
            "tokens": 2048 * step,
            "loss/lm": loss,
            "loss/mtp_1": loss + 0.3,
            "loss/mtp_2": loss + 0.6,
            "grad_norm": 1.0 / step,
            "learning_rate": 4e-3 * min(1.0, step / 10),
            "tokens_per_second": 9000.0 + step,
            "mfu": 0.17,
            "seconds/data": 0.02,
            "seconds/forward_backward": 0.15,
            "seconds/optimizer": 0.04,
            "seconds/other": 0.01,
            "precision/share/nvfp4": 0.6,
            "precision/share/bf16": 0.4,
        }
        if step % 20 == 0:
            entry |= {"eval/loss": loss + 0.05, "eval/bits_per_byte": (loss + 0.05) / math.log(2), "seconds/evaluation": 0.6}
        lines.append(json.dumps({**entry, **changes}))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if recipe is not None:
        (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return directory


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
