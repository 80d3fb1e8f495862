"""TensorBoard: the same numbers at the same steps as metrics.jsonl, below <run>/tensorboard; `tensorboard --logdir runs` shows every run.

A resumed run writes another file there and says from which step on the older ones no longer count (`purge_step`): what a killed run had
logged behind its last checkpoint disappears, and there is one curve. Needs the package tensorboard, an extra:
pip install -c constraints.txt -e '.[tensorboard]'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from train.checkpoint.remote import Location
from train.observe.base import Metrics, Observer, RunInfo
from train.observe.redact import without_secrets

FOLDER = "tensorboard"
_FLUSH_SECONDS = 10


class TensorBoard(Observer):
    """Writes <run>/tensorboard."""

    def __init__(self) -> None:
        self._writer: Any = None

    def on_start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: an optional package, and two seconds

        folder = run.run_dir / FOLDER
        self._writer = SummaryWriter(str(folder), purge_step=run.step + 1, flush_secs=_FLUSH_SECONDS)
        if run.step == 0:
            recipe = yaml.safe_dump(without_secrets(run.recipe), sort_keys=False)
            self._writer.add_text("recipe", "".join(f"    {line}\n" for line in recipe.splitlines()))

    def on_step(self, metrics: Metrics) -> None:
        self._write(metrics)

    def on_evaluation(self, metrics: Metrics) -> None:
        self._write(metrics)

    def on_checkpoint(self, step: int, path: Location) -> None:
        if self._writer is not None:
            self._writer.flush()  # a run resumed from here writes what follows

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, metrics: Metrics) -> None:
        if self._writer is not None:
            for key, value in metrics.items():
                if key != "step":
                    self._writer.add_scalar(key, value, global_step=int(metrics["step"]))
