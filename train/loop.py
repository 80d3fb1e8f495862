"""The run, read top to bottom: recipe -> layout -> run directory -> data, model, engine -> restore -> steps -> evaluation -> checkpoint.

Everything that merely watches (console, metrics file, W&B, pictures) is an observer beside the loop, see `train.observe`. However a run ends
(see `train.signals` for what it exits with), observers are closed, the directory is given back, and the process groups are left.
"""

import resource
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from data.documents import DataError
from model.count import count, linear_modules
from model.hybrid import end_step, weight_changes
from model.mixer import MIXERS
from parallel import groups
from parallel.layout import Layout
from train.build import Run, build
from train.checkpoint.checkpointer import Checkpointer, load_weights
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.reader import open_checkpoint
from train.evaluation import measure
from train.failures import Failures, RunFailed, failing_together
from train.observe import Observers, RunInfo, open_observers
from train.observe.redact import redacted, without_secrets
from train.optimizer import learning_rate
from train.precision_table import precision_tables, table_at
from train.recipe.reading import RecipeError, plain
from train.recipe.resume import lines
from train.recipe.tree import Recipe
from train.report.picture import draw_losses_of
from train.run_directory import RunDirectory, check_source, opened
from train.signals import STOPPED, StopSignals, name_of
from train.step import LossStep, sum_over_ranks, to_microbatch
from train.step_failure import Place, sentence
from train.threads import cpu_threads
from train.timing import Stopwatch
from train.utilisation import open_utilisation

MAX_SKIPPED = 10  # consecutive steps without finite gradients after which a run gives up


def run(recipe: Recipe) -> int:
    """Trains, or goes on training, the run of this recipe; returns the exit status (see `train.signals`).

    Raises RecipeError for what is the recipe's fault, and an error of the code as it was raised, after a sentence that says where. With several
    ranks the first that fails speaks, and all return its status.
    """
    with StopSignals() as signals, cpu_threads(recipe.train.threads):
        try:
            layout = groups.initialize(recipe.parallel, recipe.run.seed)
            with failing_together(layout.rank, layout.world_size) as failures:
                try:
                    failures.status = _run(recipe, layout, signals, failures)
                except BaseException as error:
                    failures.settle(error)  # before the others lose the connection
                    raise
                finally:
                    groups.shutdown()
            return failures.status
        except (DataError, CheckpointError) as error:
            raise RecipeError(str(error)) from None
        finally:
            groups.shutdown()


def _run(recipe: Recipe, layout: Layout, signals: StopSignals, failures: Failures) -> int:
    with opened(recipe, layout.rank) as directory:
        if directory.finished is not None:
            if layout.rank == 0:
                loss = directory.finished.get("eval/loss")
                print(f"{directory.path} is finished: validation loss {loss}; choose another run.dir for a new run")
            return 0
        check_source(recipe)
        run = build(recipe, layout)
        observers = open_observers(recipe.monitor, draw_losses_of) if layout.rank == 0 else Observers(())
        place = Place()
        try:
            return _train(run, directory, observers, signals, place)
        except BaseException as error:
            where = sentence(error, place, layout.rank, layout.world_size, run.chunks)
            observers.on_error(failures.settle(error, where))
            raise
        finally:
            observers.close()
            failures.meet()
            run.engine.close()


def _train(run: Run, directory: RunDirectory, observers: Observers, signals: StopSignals, place: Place) -> int:
    recipe, layout = run.recipe, run.layout
    is_main = layout.rank == 0
    report = print if is_main else (lambda line: None)
    checkpointer = Checkpointer(run.run_dir, run.engine, run.chunks, keep=recipe.checkpoint.keep, report=report)
    step, elapsed, state = _restore(run, checkpointer)
    if is_main:
        directory.store_recipe(recipe, step)
        directory.store_tokenizer(run.data.tokenizer)
    signals.only_remember()
    observers.load_state(state.get("observers", {}))
    utilisation = open_utilisation(recipe, layout.device, layout.world_size) if is_main else None
    tables = precision_tables(recipe)
    observers.on_start(
        _info(run, directory, step, table_at(tables, step / recipe.total_steps).text, [] if utilisation is None else [utilisation.line])
    )

    last, save_every = recipe.last_step, recipe.save_every
    eval_every, log_every = recipe.train.eval_every, recipe.train.log_every
    evaluators = recipe.evaluation.chosen()
    started, skipped, saved = time.perf_counter() - elapsed, 0, step
    evaluated: dict[str, float] | None = None
    seconds_saving = 0.0
    stop = _stop_wanted(signals, layout)
    owed = bool(state.get("evaluation_owed", False))  # the run was stopped between this step and its evaluation
    while (step < last or owed) and not stop:
        if not owed:
            table = table_at(tables, step / recipe.total_steps)
            formats_change = step > 0 and table is not table_at(tables, (step - 1) / recipe.total_steps)
            if formats_change:
                observers.on_formats(step + 1, table.text)
            place.doing, place.step = "step", step + 1
            place.samples = tuple(index for samples in run.plan.samples(step) for index in samples)
            observers.on_step_begin(step + 1)
            begin, clock = time.perf_counter(), Stopwatch(layout.device)
            checkpointer.maybe_wait()
            metrics = train_step(run, step, clock)
            step += 1
            seconds = time.perf_counter() - begin
            place.samples = ()
            skipped = 0 if metrics.pop("taken") else skipped + 1
            if skipped:
                observers.on_skipped(step, metrics["grad_norm"])
            if skipped >= MAX_SKIPPED:
                raise RunFailed(
                    f"gradients were not finite in {skipped} consecutive steps, the last one step {step}; weights are those of step "
                    f"{step - skipped}: resume with a lower optimizer.learning_rate in a new run.dir"
                )
            if (log_every and step % log_every == 0) or step in (1, last) or formats_change or recipe.monitor.quantization.due(step):
                times = _pace(run, seconds, clock) | ({"seconds/checkpoint": seconds_saving} if seconds_saving else {})
                seconds_saving = 0.0
                used = {} if utilisation is None else utilisation.metrics(table.shares, seconds)
                observers.on_step({**_at(recipe, step), **metrics, **times, **used, **table.metrics()})
        stop = _stop_wanted(signals, layout)
        owed = owed or bool(eval_every and step % eval_every == 0) or step == last
        if owed and not stop:
            place.doing, owed = "evaluation after step", False
            begin = time.perf_counter()
            evaluated = measure(run, evaluators, step)
            if evaluated:
                observers.on_evaluation({**_at(recipe, step), **evaluated, "seconds/evaluation": time.perf_counter() - begin})
            stop = _stop_wanted(signals, layout)
        if ((save_every and step % save_every == 0) or step == last or stop) and saved != step:
            place.doing = "checkpoint after step"
            kept = {"elapsed": time.perf_counter() - started, "observers": observers.state(), "evaluation_owed": owed}
            begin = time.perf_counter()
            path = checkpointer.save(step, kept, tokens=step * recipe.tokens_per_step)
            seconds_saving += time.perf_counter() - begin
            saved = step
            observers.on_checkpoint(step, path)
            stop = stop or _stop_wanted(signals, layout)
    checkpointer.close()
    place.doing = "the end, after step"
    seconds = time.perf_counter() - started
    summary: dict[str, Any] = {**_at(recipe, step), "seconds": seconds, "session_seconds": seconds - elapsed}
    if (stop and step < recipe.total_steps) or owed:
        observers.on_end({**summary, "stopped": "a signal", "signal": name_of(stop)})
        return STOPPED
    if evaluated is None:
        evaluated = measure(run, evaluators, step)
    summary |= evaluated
    if step < recipe.total_steps:
        summary["stopped"] = f"run.stop_after={recipe.run.stop_after}"
    elif is_main:
        baselines = run.data.count_baselines()
        if baselines is not None:
            summary |= {"baseline/bigram": baselines.bigram, "baseline/trigram": baselines.trigram}
        directory.finish(summary)
    observers.on_end(summary)
    return 0


def train_step(run: Run, step: int, clock: Stopwatch | None = None) -> dict[str, float]:
    """Optimizer step `step` (from 0); its metrics, the same on every rank. `taken` is 0 when gradients were not finite.

    clock: is told of the phases of the step (see `train.timing`).
    """
    recipe, layout = run.recipe, run.layout
    clock = clock or Stopwatch(layout.device)
    progress = step / recipe.total_steps
    depths = recipe.model.mtp_depths
    microbatches = [to_microbatch(run.data.batch(s, step), layout.device, progress, depths) for s in run.plan.samples(step)]
    clock.mark("data")
    counts = sum_over_ranks(torch.stack([m.loss_counts() for m in microbatches]).sum(0), layout, pipeline=False)
    losses = LossStep(layout, counts, recipe.model.mtp_loss_scale)
    rate = learning_rate(recipe.optimizer, step, recipe.total_steps, recipe.tokens_per_step)
    measured = recipe.monitor.quantization.due(step + 1)
    if measured:
        run.context.health.start()
    clock.mark("other")
    result = run.engine.train_step(
        losses,
        microbatches,
        sequence_length=recipe.train.sequence_length,
        micro_batch_size=recipe.micro_batch_size,
        learning_rate=rate,
        mark=clock.mark,
    )
    if result.taken:
        run.engine.update_masters(weight_changes(run.chunks, step, progress))
    moe = end_step(run.chunks, update=result.taken)
    means = losses.means().tolist()
    metrics = {"loss/lm": means[0]}
    metrics |= {f"loss/mtp_{depth}": value for depth, value in enumerate(means[1:], start=1)}
    total = means[0] + moe.get("moe/aux_loss", 0.0)
    if depths:
        total += recipe.model.mtp_loss_scale * sum(means[1:]) / depths
    metrics |= {"loss/total": total, "grad_norm": result.grad_norm, "learning_rate": rate, **moe}
    if measured:
        metrics |= run.context.health.finish()
    metrics["taken"] = float(result.taken)
    return metrics


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
    description = (run.layout.describe(), *run.data.describe(), _describe_backend(run, step), *hardware, *changes)
    return RunInfo(
        recipe=without_secrets(plain(recipe)),
        run_dir=run.run_dir,
        parameters=counted.parameters + counted.mtp,
        active_parameters=counted.active,
        step=step,
        total_steps=recipe.total_steps,
        tokens_per_step=recipe.tokens_per_step,
        resumed=step > 0,
        description=tuple(redacted(line) for line in description),
        precision_table=table,
        layers=tuple(MIXERS[letter].name for letter in recipe.model.layers),
    )


def _restore(run: Run, checkpointer: Checkpointer) -> tuple[int, float, dict[str, Any]]:
    """(steps done, seconds spent, the loop's state) from the newest valid checkpoint; zeros for a new run."""
    checkpoint = checkpointer.load_newest()
    if checkpoint is not None:
        return checkpoint.step, float(checkpoint.state.get("elapsed", 0.0)), dict(checkpoint.state)
    source = run.recipe.checkpoint.initialize_from
    if source is not None:
        load_weights(open_checkpoint(source), run.chunks)
        run.engine.reload_masters()
    return 0, 0.0, {}


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
