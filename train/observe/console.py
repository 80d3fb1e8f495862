"""Progress for a person: a header, a line per logged step, and where everything is at the end; the same in
<run>/log.txt.

Plain lines only, no control characters: they read the same on a terminal, in a file and in a scheduler's log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from train.checkpoint.remote import Location
from train.goodput import summary_line
from train.observe.base import Alert, Metrics, Observer, RunInfo
from train.observe.lines import beside, count, duration, evaluation_line, loss_text, recipe_lines, sample_lines, step_column, step_line
from train.observe.picture import LossPicture
from train.observe.redact import without_secrets
from train.observe.sample_settings import Sample

FILE_NAME = "log.txt"


class Console(Observer):
    """Prints progress and appends the same lines to <run>/log.txt.

    `picture` is asked for its path at the end; `clock` gives seconds.
    """

    def __init__(
        self,
        picture: LossPicture | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._picture = picture
        self._stream = stream
        self._clock = clock
        self._run: RunInfo | None = None
        self._waiting: list[str] = []
        self._seconds_per_step: float | None = None
        self._intervals = 0
        self._last_step = 0
        self._last_time = 0.0
        self._start_time = 0.0
        self._evaluated: dict[str, float | int] = {}

    def say(self, text: str) -> None:
        """Prints a line and logs it; a line said before the header follows the header."""
        if self._run is None:
            self._waiting.append(text)
            return
        print(text, file=self._stream or sys.stdout, flush=True)
        self._log(text)

    def _log(self, text: str) -> None:
        if self._run is not None:
            with (self._run.run_dir / FILE_NAME).open("a", encoding="utf-8") as log:
                log.write(text + "\n")

    def on_start(self, run: RunInfo) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._last_step = run.step
        self._start_time = self._last_time = self._clock()
        if run.resumed:
            self.say(f"\nResuming {run.run_dir} after step {run.step:,} of {run.total_steps:,}")
        else:
            self.say(f"Run {run.run_dir}")
        for line in recipe_lines(without_secrets(run.recipe)):
            self.say(line)
        self.say("")
        active = "" if run.active_parameters == run.parameters else f" ({run.active_parameters:,} active per token)"
        self.say(f"  parameters  {run.parameters:,}{active}")
        tokens = run.total_steps * run.tokens_per_step
        self.say(f"  length      {run.total_steps:,} steps x {run.tokens_per_step:,} tokens = {count(tokens)} tokens")
        for line in run.description:
            self.say(f"  {line}")
        if run.precision_table:
            self.say("")
            self.say(run.precision_table.rstrip("\n"))
        self.say("")
        for line in self._waiting:
            self.say(line)
        self._waiting.clear()

    def on_formats(self, step: int, precision_table: str) -> None:
        self.say(f"{step_column({'step': step}, self._run)}  formats change, by precision.schedule or a rule's start or end:")
        self.say(precision_table.rstrip("\n"))

    def on_step(self, metrics: Metrics) -> None:
        if self._run is None:
            return
        step = int(metrics["step"])
        self.say(step_line(metrics, self._run.total_steps, self._seconds_left(step)))

    def on_skipped(self, step: int, grad_norm: float) -> None:
        self.say(
            f"step {step}: loss or gradients are not finite (norm {grad_norm}); no weight was changed, the step's samples are passed over"
        )

    def on_alert(self, alert: Alert) -> None:
        self.say(f"{step_column({'step': alert.step}, self._run)}  ALERT ({alert.kind}): {alert.text}")

    def on_rewind(self, step: int, to: int) -> None:
        self.say(f"{step_column({'step': step}, self._run)}  going back to the checkpoint of step {to:,}")
        self._last_step = to

    def on_evaluation(self, metrics: Metrics) -> None:
        self._evaluated.update(metrics)
        self.say(evaluation_line(metrics, self._run))

    def on_samples(self, metrics: Metrics, samples: Sequence[Sample]) -> None:
        for sample in samples:
            for line in sample_lines(sample, step_column(metrics, self._run)):
                self.say(line)

    def on_checkpoint(self, step: int, path: Location) -> None:
        self.say(f"{step_column({'step': step}, self._run)}  checkpoint {path}")

    def on_end(self, summary: Mapping[str, Any]) -> None:
        run = self._run
        if run is None:
            return
        step = int(summary.get("step", self._last_step))
        seconds = float(summary.get("session_seconds", self._clock() - self._start_time))
        stopped = summary.get("stopped")
        if "signal" in summary:
            self.say(
                f"Stopped by {summary['signal']} after step {step:,} of {run.total_steps:,}: start the same command again to go on from there."
            )
            return
        self.say("")
        if stopped or step < run.total_steps:
            why = f" ({stopped})" if stopped else ""
            self.say(f"Stopped{why} after step {step:,} of {run.total_steps:,}, {duration(seconds)} in this session.")
            self.say("Start the same command again to go on from the last checkpoint.")
        else:
            whole = float(summary.get("seconds", seconds))
            before = f" of {duration(whole)} in all" if round(whole) > round(seconds) else ""
            self.say(f"Finished {step:,} steps; this session took {duration(seconds)}{before}.")
        last = {**self._evaluated, **summary}
        if "eval/loss" in last:
            self.say(f"  validation loss  {loss_text(last)}{beside(last)}")
        if (line := summary_line(last)) is not None:
            self.say(f"  goodput          {line}")
        if self._picture is not None and self._picture.path is not None:
            self.say(f"  loss curves      {self._picture.path}")
        self.say(f"  run directory    {run.run_dir}")

    def on_error(self, error: BaseException) -> None:
        self._log(f"Failed: {error}")  # what a person sees is printed by whoever ends the run, on the rank that failed

    def _seconds_left(self, step: int) -> float | None:
        """Smoothed wall time per step (evaluations and checkpoints included) times the steps left."""
        now = self._clock()
        done = step - self._last_step
        if done > 0:
            latest = (now - self._last_time) / done
            # The first interval holds warm-up work (compilation, first allocations): the second replaces it.
            self._intervals += 1
            smooth = self._intervals > 2 and self._seconds_per_step is not None
            self._seconds_per_step = 0.8 * self._seconds_per_step + 0.2 * latest if smooth else latest  # type: ignore[operator]
            self._last_step, self._last_time = step, now
        if self._seconds_per_step is None or self._run is None:
            return None
        return self._seconds_per_step * max(0, self._run.total_steps - step)
