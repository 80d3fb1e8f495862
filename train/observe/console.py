"""Progress for a person: a header, a line per logged step, and where everything is at the end; the same lines in log.txt."""

from __future__ import annotations

from train.observe.base import Metrics, Observer, RunInfo


class Console(Observer):
    """Prints progress and writes the same lines to <run>/log.txt."""

    def on_start(self, run: RunInfo) -> None:
        print(f"run {run.run_dir}  {run.parameters:,} parameters", flush=True)

    def on_step(self, metrics: Metrics) -> None:
        print(metrics, flush=True)
