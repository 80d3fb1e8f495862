"""Training, from the checkpoint it begins at to its last step: step -> observe -> maybe evaluate -> maybe save, until done or asked to stop.

Everything that merely watches (console, metrics file, W&B, pictures) is an observer beside the loop, see `train.observe`.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from model.count import count, linear_modules
from model.mixer import MIXERS
from model.stages import describe
from parallel.collectives import COLLECTIVES
from parallel.layout import Layout
from train.build import Run
from train.checkpoint.checkpointer import Checkpointer, load_weights
from train.checkpoint.reader import open_checkpoint
from train.checkpoint.remote import Location
from train.evaluation import measure
from train.evaluation.acceptance import Acceptance
from train.failures import RunFailed
from train.generation.live import accepted_lengths, live_samples
from train.goodput import FILE_NAME, Ledger
from train.incidents.incidents import Incidents, Rewind
from train.lineage import begin_branch, read_parent
from train.observe import Observers, RunInfo
from train.observe.base import Alert
from train.observe.redact import redacted, without_secrets
from train.precision_table import PrecisionTable, precision_tables, table_at
from train.recipe.reading import plain
from train.recipe.resume import lines
from train.recipe.tree import Recipe
from train.run_directory import RunDirectory
from train.run_facts import run_facts
from train.signals import STOPPED, StopSignals, name_of
from train.step_failure import Place
from train.stragglers import PHASES, Stragglers, Times
from train.timing import Stopwatch
from train.train_step import train_step
from train.utilisation import open_utilisation


class Training:
    """One start of a run; every rank makes one and calls `train`.

    step: optimizer steps done. saved: after which of them a checkpoint was last begun; committed: that of the newest complete one. owed: an
    evaluation that was due when the run was asked to stop. stop: the signal some rank has received, the same on every rank, or 0.
    """

    def __init__(self, run: Run, directory: RunDirectory, observers: Observers, signals: StopSignals, place: Place) -> None:
        self.run, self.recipe, self.layout = run, run.recipe, run.layout
        self.directory, self.observers, self.signals, self.place = directory, observers, signals, place
        self.is_main = self.layout.rank == 0
        report = print if self.is_main else (lambda line: None)
        self.checkpointer = Checkpointer(
            run.run_dir,
            run.engine,
            run.chunks,
            storage=self.recipe.checkpoint.storage,
            retention=self.recipe.retention,
            asynchronous=self.recipe.checkpoint.asynchronous,
            report=report,
            saved=self._saved,
            failed=self._save_failed,
        )
        self.stragglers = Stragglers(self.recipe.monitor.stragglers, self.layout)
        self.incidents = Incidents(run, self.checkpointer, observers)
        self.evaluators = self.recipe.evaluation.chosen()
        self.tables = precision_tables(self.recipe)
        self.utilisation = open_utilisation(self.recipe, self.layout.device, self.layout.world_size) if self.is_main else None
        self.step = self.saved = self.committed = self.stop = 0
        self.failed_saves, self.trouble = 0, ""
        self.owed = self.save_owed = False
        self.evaluated: dict[str, float] | None = None
        self.elapsed = self.seconds_saving = 0.0
        self.started = time.perf_counter()
        self.ledger = Ledger(run.run_dir / FILE_NAME if self.is_main else None)

    def train(self) -> int:
        """Returns the exit status."""
        try:
            return self._train()
        except BaseException:
            self.checkpointer.abandon()
            raise
        finally:
            self.ledger.close()

    def _train(self) -> int:
        self._begin()
        self._look()
        while (self.step < self.recipe.last_step or self.owed) and not self.stop:
            if not self.owed:
                if not self._take_step():
                    continue
                self._speak()
            self._look()
            self.owed = self.owed or self._evaluation_due()
            if self.owed and not self.stop:
                self._evaluate()
                self._look()
            self._commit()
            if self._save_due() and self._follow(self.incidents.before_save(self.step)):
                self._save()
                self._look()
        self._finish_saving()
        return self._end()

    # -- the parts, in the order in which they are called -----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Restores the run from its newest checkpoint, or from where a new one starts, and tells observers."""
        state = self._restore()
        self.saved = self.committed = self.step
        if self.is_main:
            self.directory.store_recipe(self.recipe, self.step)
            self.directory.store_tokenizer(self.run.data.tokenizer)
            self.directory.describe_in(self.recipe.checkpoint.storage)
        self.signals.only_remember()
        self.observers.load_state(state.get("observers", {}))
        self.owed = bool(state.get("evaluation_owed", False))
        self.failed_saves = int(state.get("failed_saves", 0))
        self.incidents.load_state(state.get("incidents", {}))
        self._store_skipped()
        hardware = [] if self.utilisation is None else [self.utilisation.line]
        self.observers.on_start(_info(self.run, self.directory, self.step, self._table(self.step).text, hardware))
        self._tell_of_damage()
        self.elapsed = float(state.get("elapsed", 0.0))
        self.started = time.perf_counter() - self.elapsed

    def _restore(self) -> dict[str, Any]:
        """The loop's state; empty for a new run."""
        checkpoint = self.checkpointer.load_newest()
        if checkpoint is not None:
            self.step = checkpoint.step
            return dict(checkpoint.state)
        if self.recipe.run.parent is not None:
            return self._restore_parent(self.recipe.run.parent)
        source = self.recipe.checkpoint.initialize_from
        if source is not None:
            load_weights(open_checkpoint(source), self.run.chunks)
            self.run.engine.reload_masters()
        return {}

    def _restore_parent(self, source: str) -> dict[str, Any]:
        """A branch goes on where its parent was; what the parent's observers and its disk remembered stays with the parent."""
        checkpoint = open_checkpoint(source)
        self.checkpointer.load(checkpoint)
        self.step = checkpoint.step
        if self.is_main:
            begin_branch(self.run.run_dir, checkpoint, self.recipe)
        return {key: value for key, value in checkpoint.state.items() if key not in ("observers", "elapsed", "failed_saves", "milestone")}

    def _tell_of_damage(self) -> None:
        """Checkpoints newer than the one just restored that are not what was written."""
        for line in self.checkpointer.passed_over:
            self.observers.on_alert(
                Alert("checkpoint", self.step, f"{line.rstrip('.')}; the run goes on from step {self.step}", severe=True)
            )

    def _store_skipped(self) -> None:
        if self.is_main:
            with suppress(OSError):  # of a full disk: the next start says it
                self.directory.store_skipped(self.run.plan.skipped, self.step)

    def _look(self) -> None:
        """Has some rank received a signal?"""
        self.stop = self.stop or _stop_wanted(self.signals, self.layout)

    def _take_step(self) -> bool:
        """False: it made the run go back."""
        table, formats_change = self._table(self.step), self._formats_change()
        if formats_change:
            self.observers.on_formats(self.step + 1, table.text)
        self.place.doing, self.place.step = "step", self.step + 1
        self.place.samples = tuple(index for samples in self.run.plan.samples(self.step) for index in samples)
        self.observers.on_step_begin(self.step + 1)
        self.ledger.spend("other")
        begin, clock, waited = time.perf_counter(), Stopwatch(self.layout.device), COLLECTIVES.seconds
        metrics = train_step(self.run, self.step, clock)
        self.step += 1
        seconds = time.perf_counter() - begin
        own = Times(seconds - (COLLECTIVES.seconds - waited), *(clock.host_seconds(phase) for phase in PHASES))
        used = {} if self.utilisation is None else self.utilisation.metrics(table.shares, seconds)
        self.ledger.spend_step(self.step, clock.host_seconds("data"), used.get("mfu", 0.0) * seconds)
        self.place.samples = ()
        if not self._follow(self.incidents.after_step(self.step, metrics)):
            return False
        if self._log_due() or formats_change:
            ranks, alert = self.stragglers.measure(self.step, own)
            self._log({**metrics, **used, **ranks}, table, seconds, clock)
            if alert is not None:
                self.observers.on_alert(alert)
        return True

    def _speak(self) -> None:
        """Lets the model make texts, where some are due."""
        if self.recipe.monitor.samples.due(self.step, self.recipe.last_step):
            self.place.doing = "texts after step"
            self.ledger.spend("other")
            begin = time.perf_counter()
            samples = live_samples(self.run, self.step)
            self.ledger.spend("evaluation")
            self.observers.on_samples({**_at(self.recipe, self.step), "seconds/samples": time.perf_counter() - begin}, samples)

    def _follow(self, rewind: Rewind | None) -> bool:
        """Whether the run goes on from where it is. Where it was taken back, its checkpoint there is written again with what is known since."""
        if rewind is None:
            return True
        before, self.step = self.step, rewind.step
        self.committed = self.step
        self.owed, self.evaluated = bool(rewind.state.get("evaluation_owed", False)), None
        self.observers.on_rewind(before, self.step)
        self._tell_of_damage()
        if self._table(before - 1) is not self._table(self.step):
            self.observers.on_formats(self.step + 1, self._table(self.step).text)
        self._save()
        self._store_skipped()
        return False

    def _log_due(self) -> bool:
        every = self.recipe.train.log_every
        due = bool(every and self.step % every == 0) or self.step in (1, self.recipe.last_step)
        return due or self.recipe.monitor.quantization.due(self.step)

    def _log(self, metrics: dict[str, float], table: PrecisionTable, seconds: float, clock: Stopwatch) -> None:
        times = _pace(self.run, seconds, clock) | ({"seconds/checkpoint": self.seconds_saving} if self.seconds_saving else {})
        self.seconds_saving = 0.0
        failures = {"checkpoint/failures": self.failed_saves} if self.failed_saves else {}
        self.observers.on_step(
            {
                **_at(self.recipe, self.step),
                **metrics,
                **times,
                **table.metrics(),
                **failures,
                **self.ledger.metrics(),
                **self.incidents.metrics(),
            }
        )

    def _evaluation_due(self) -> bool:
        every = self.recipe.train.eval_every
        return bool(every and self.step % every == 0) or self.step == self.recipe.last_step

    def _evaluate(self) -> None:
        self.place.doing, self.owed = "evaluation after step", False
        self.ledger.spend("other")
        begin = time.perf_counter()
        self.evaluated = measure(self.run, self.evaluators, self.step)
        acceptance = self.evaluators.get("acceptance")
        if isinstance(acceptance, Acceptance) and acceptance.length_due(self.step, self.recipe.last_step):
            self.evaluated |= accepted_lengths(self.run, self.step, acceptance)
        self.ledger.spend("evaluation")
        if self.evaluated:
            seconds = time.perf_counter() - begin
            self.observers.on_evaluation({**_at(self.recipe, self.step), **self.evaluated, "seconds/evaluation": seconds})

    def _save_due(self) -> bool:
        """A checkpoint waits for a step that is taken, unless the run ends here."""
        last = bool(self.stop) or self.step == self.recipe.last_step
        self.save_owed = (self.save_owed or last or self.recipe.save_due(self.step)) and self.saved != self.step
        return self.save_owed and (last or not self.incidents.streak)

    def _save(self) -> None:
        """Begins a checkpoint; `_saved` or `_save_failed` hears what became of it, now or at a later step."""
        self.place.doing, self.saved, self.save_owed = "checkpoint after step", self.step, False
        state = {
            "elapsed": time.perf_counter() - self.started,
            "observers": self.observers.state(),
            "evaluation_owed": self.owed,
            "failed_saves": self.failed_saves,
            "incidents": self.incidents.state(),
        }
        tokens, milestone = self.step * self.recipe.tokens_per_step, self.recipe.milestone(self.step)
        with self._standing_still():
            self.checkpointer.save(self.step, state, tokens=tokens, milestone=milestone)

    def _commit(self) -> None:
        """Completes the checkpoint under way, if every rank has written its part of it."""
        if self.checkpointer.under_way is not None:
            self.place.doing = "checkpoint after step"
            with self._standing_still():
                self.checkpointer.poll()

    def _finish_saving(self) -> None:
        """Waits for the last checkpoint. Raises RunFailed where it could not be written: then the run must not end as if it were."""
        self.place.doing = "checkpoint after step"
        with self._standing_still():
            self.checkpointer.close()
        if self.committed != self.step:
            why = f"was stopped by {name_of(self.stop)}" if self.stop else "has ended"
            onward = f"from the newest one, that of step {self.committed}" if self.committed else "from its beginning"
            raise RunFailed(
                f"the run {why} after step {self.step}, and its last checkpoint could not be written ({self.trouble}): put that right, and start "
                f"the same command again, which goes on {onward}"
            )

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Training waits for a checkpoint meanwhile."""
        self.ledger.spend("other")
        begin = time.perf_counter()
        yield
        self.seconds_saving += time.perf_counter() - begin
        self.ledger.spend("checkpoint")

    def _saved(self, step: int, path: Location) -> None:
        self.committed = step
        self.observers.on_checkpoint(step, path)

    def _save_failed(self, step: int, trouble: str) -> None:
        """A disk may be full for an hour: the run goes on, and says so."""
        self.failed_saves += 1
        trouble = self.trouble = redacted(trouble)
        newest = f"the newest checkpoint is that of step {self.committed}" if self.committed else "there is no checkpoint yet"
        self.observers.on_alert(
            Alert("checkpoint", self.step, f"{trouble}; nothing that was written before is lost, {newest}", severe=True)
        )

    def _end(self) -> int:
        """Sums the run up; returns the exit status."""
        recipe, step = self.recipe, self.step
        self.place.doing = "the end, after step"
        seconds = time.perf_counter() - self.started
        self.ledger.close()
        summary: dict[str, Any] = {**_at(recipe, step), "seconds": seconds, "session_seconds": seconds - self.elapsed}
        summary |= self.ledger.metrics()
        if (self.stop and step < recipe.total_steps) or self.owed:
            self.observers.on_end({**summary, "stopped": "a signal", "signal": name_of(self.stop)})
            return STOPPED
        if self.evaluated is None:
            self.evaluated = measure(self.run, self.evaluators, step)
        summary |= self.evaluated
        if step < recipe.total_steps:
            summary["stopped"] = f"run.stop_after={recipe.run.stop_after}"
        elif self.is_main:
            baselines = self.run.data.count_baselines()
            if baselines is not None:
                summary |= {"baseline/bigram": baselines.bigram, "baseline/trigram": baselines.trigram}
            self.directory.finish(summary)
        self.observers.on_end(summary)
        return 0

    def _table(self, step: int) -> PrecisionTable:
        return table_at(self.tables, step / self.recipe.total_steps)

    def _formats_change(self) -> bool:
        """Whether the next step runs in other formats than the last one."""
        return self.step > 0 and self._table(self.step) is not self._table(self.step - 1)


# -- pieces of the above --------------------------------------------------------------------------------------------------------------


def _stop_wanted(signals: StopSignals, layout: Layout) -> int:
    """The number of a signal that some rank has received, the same on every rank; 0: none. Collective: one small all-reduce."""
    if layout.world_size == 1:
        return signals.received
    received = torch.tensor([signals.received], device=layout.device)
    dist.all_reduce(received, op=dist.ReduceOp.MAX)
    return int(received.item())


def _at(recipe: Recipe, step: int) -> dict[str, int]:
    return {"step": step, "tokens": step * recipe.tokens_per_step}


def _info(run: Run, directory: RunDirectory, step: int, table: str, hardware: list[str]) -> RunInfo:
    """What observers are told before the first step."""
    recipe, counted = run.recipe, count(run.recipe.model)
    changes = (f"changed since the run began: {line}" for line in lines(directory.changes))
    parent = read_parent(run.run_dir)
    branch = () if parent is None else (f"branch of {parent.run_dir} after step {parent.step:,}", *lines(parent.changes))
    stages = describe(recipe.model, recipe.parallel, recipe.train.sequence_length)
    description = (
        *branch,
        run.layout.describe(),
        *stages,
        *_describe_compute(run),
        *run.data.describe(),
        _describe_backend(run, step),
        *hardware,
        *changes,
    )
    return RunInfo(
        recipe=without_secrets(plain(recipe)),
        run_dir=run.run_dir,
        parameters=counted.parameters + counted.mtp,
        active_parameters=counted.active,
        step=step,
        total_steps=recipe.total_steps,
        tokens_per_step=recipe.tokens_per_step,
        resumed=step > (0 if parent is None else parent.step),
        description=tuple(redacted(line) for line in description),
        precision_table=table,
        layers=tuple(MIXERS[letter].name for letter in recipe.model.layers),
        parent=parent,
        facts=run_facts(recipe, run.layout),
    )


def _describe_compute(run: Run) -> list[str]:
    """What is asked for and slow, for the head of the run."""
    if run.recipe.precision.compute != "bf16" or run.layout.device.type == "cuda":
        return []
    return ["bf16 activations on a CPU, which multiplies them up to 80 times slower than fp32: precision.compute=fp32 is the faster choice"]


def _describe_backend(run: Run, step: int) -> str:
    """What computes NVFP4, for the head of the run."""
    policy, progress = run.context.policy, step / run.recipe.total_steps
    modules = linear_modules(run.recipe.model)
    return run.context.backend.describe([(module.name, policy.formats(module.name, progress), module.routed) for module in modules])


def _pace(run: Run, seconds: float, clock: Stopwatch) -> dict[str, float | int]:
    """How long a step took, and where its time went."""
    if run.layout.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    phases = clock.seconds()
    named = {f"seconds/{name}": phases.get(name, 0.0) for name in ("data", "forward_backward", "optimizer")}
    return {
        "step_seconds": seconds,
        "tokens_per_second": run.recipe.tokens_per_step / seconds,
        "memory_peak_bytes": peak,
        **named,
        "seconds/other": max(0.0, seconds - sum(named.values())),
    }
