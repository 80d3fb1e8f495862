"""Progress for a person: a header, a line per logged step, and where everything is at the end; the same in
<run>/log.txt.

Plain lines only, no control characters: they read the same on a terminal, in a file and in a scheduler's log.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from train.observe.base import Metrics, Observer, RunInfo
from train.observe.picture import LossPicture
from train.observe.redact import without_secrets

FILE_NAME = "log.txt"
_WIDTH = 118  # columns of the header


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
        self._validation: Metrics = {}

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
        for line in _recipe_lines(without_secrets(run.recipe)):
            self.say(line)
        self.say("")
        active = "" if run.active_parameters == run.parameters else f" ({run.active_parameters:,} active per token)"
        self.say(f"  parameters  {run.parameters:,}{active}")
        tokens = run.total_steps * run.tokens_per_step
        self.say(f"  length      {run.total_steps:,} steps x {run.tokens_per_step:,} tokens = {_count(tokens)} tokens")
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
        self.say(f"{_step_column({'step': step}, self._run)}  formats change, by precision.schedule or a rule's start or end:")
        self.say(precision_table.rstrip("\n"))

    def on_step(self, metrics: Metrics) -> None:
        if self._run is None:
            return
        step = int(metrics["step"])
        self.say(step_line(metrics, self._run.total_steps, self._seconds_left(step)))

    def on_skipped(self, step: int, grad_norm: float) -> None:
        self.say(f"step {step}: gradients are not finite (norm {grad_norm}); no weight was changed, the step's samples are passed over")

    def on_evaluation(self, metrics: Metrics) -> None:
        self._validation = dict(metrics)
        self.say(f"{_step_column(metrics, self._run)}  {evaluation_text(metrics)}")

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.say(f"{_step_column({'step': step}, self._run)}  checkpoint {path}")

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
        loss = summary.get("eval/loss", self._validation.get("eval/loss"))
        if loss is not None:
            self.say(f"  validation loss  {loss:.4f} nats per token{_beside(loss, summary.get('baseline/trigram'))}")
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


def step_line(metrics: Metrics, total_steps: int, seconds_left: float | None) -> str:
    """One progress line; what was not measured is left out."""
    width = len(f"{total_steps:,}")
    parts = [f"step {int(metrics['step']):>{width},}/{total_steps:,}"]
    if "loss/lm" in metrics:
        parts.append(f"loss {metrics['loss/lm']:.4f}")
    depths = [f"{metrics[key]:.4f}" for key in sorted(metrics) if key.startswith("loss/mtp_")]
    if depths:
        parts.append(f"mtp {' '.join(depths)}")
    if "grad_norm" in metrics:
        parts.append(f"grad {metrics['grad_norm']:#.3g}")
    if "learning_rate" in metrics:
        parts.append(f"lr {metrics['learning_rate']:.2e}")
    if "tokens_per_second" in metrics:
        parts.append(f"{_count(metrics['tokens_per_second'])} tok/s")
    if seconds_left is not None:
        parts.append(f"left {duration(seconds_left)}")
    return "  ".join(parts)


def evaluation_text(metrics: Metrics) -> str:
    """What was measured, for a person: `validation loss 1.3381 nats per token`, and other evaluators' metrics by name."""
    parts = [f"validation loss {metrics['eval/loss']:.4f} nats per token"] if "eval/loss" in metrics else []
    known = ("step", "tokens", "eval/loss", "eval/bits_per_byte")
    parts += [f"{name} {value:.4g}" for name, value in metrics.items() if name not in known and not name.startswith("seconds/")]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for a person: 8.2s, 3m 05s, 2h 07m, 4d 03h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def _beside(loss: float, trigram: float | None) -> str:
    if trigram is None:
        return ""
    difference = trigram - loss
    verdict = f"{difference:.4f} below" if difference > 0 else f"{-difference:.4f} above"
    return f"; {verdict} a trigram count model's {trigram:.4f} on the same text"


def _step_column(metrics: Metrics, run: RunInfo | None) -> str:
    width = len(f"{run.total_steps:,}") if run else 1
    return f"step {int(metrics['step']):>{width},}" + (f"/{run.total_steps:,}" if run else "")


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + letter
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}".rstrip(".")


def _recipe_lines(recipe: Mapping[str, Any]) -> list[str]:
    """The recipe as `group  key=value key=value`, wrapped; unset (null) and empty values are left out."""
    lines: list[str] = []
    width = max((len(group) for group in recipe), default=0)
    for group, value in recipe.items():
        pairs = list(_pairs("", value)) if isinstance(value, Mapping) else [str(value)]
        if pairs:
            head = f"  {group:<{width}}  "
            lines += textwrap.wrap(
                " ".join(pairs),
                _WIDTH,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines


def _pairs(prefix: str, values: Mapping[str, Any]) -> list[str]:
    pairs: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _pairs(f"{prefix}{key}.", value)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            pairs.append(f"{prefix}{key}=[{len(value)}]")  # rules, phases: the precision table and recipe.yaml show them
        elif isinstance(value, list | tuple):
            if value:
                pairs.append(f"{prefix}{key}=[{','.join(map(str, value))}]")
        elif value is not None and value != "":
            pairs.append(f"{prefix}{key}={value}")
    return pairs
