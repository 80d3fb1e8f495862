"""The run, read top to bottom: recipe -> layout -> data -> model -> engine -> restore -> steps -> evaluation -> checkpoint.

Everything that merely watches (console, metrics file, W&B, pictures) is an observer beside the loop, see `train.observe`.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from data.documents import DataError
from data.text_data import TextData
from model.count import count, linear_modules
from model.hybrid import end_step
from parallel import groups
from train.build import Run, build
from train.checkpoint.checkpointer import Checkpointer, load_weights
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.reader import open_checkpoint
from train.evaluation.validation import evaluate
from train.observe import Observers, RunInfo, open_observers
from train.observe.metrics import FILE_NAME, decode_lines
from train.observe.redact import redacted, without_secrets
from train.optimizer import learning_rate
from train.precision_table import precision_tables, table_at
from train.recipe.reading import RecipeError, plain
from train.recipe.resume import changed_keys
from train.recipe.tree import Recipe
from train.step import LossStep, sum_over_ranks, to_microbatch
from train.utilisation import open_utilisation

MAX_SKIPPED = 10  # consecutive steps without finite gradients after which a run gives up


def train_step(run: Run, step: int) -> dict[str, float]:
    """Optimizer step `step` (from 0); its metrics, the same on every rank. `taken` is 0 when gradients were not finite."""
    recipe, layout = run.recipe, run.layout
    progress = step / recipe.total_steps
    depths = recipe.model.mtp_depths
    microbatches = [to_microbatch(run.data.batch(s, step), layout.device, progress, depths) for s in run.plan.samples(step)]
    counts = sum_over_ranks(torch.stack([m.loss_counts() for m in microbatches]).sum(0), layout, pipeline=False)
    losses = LossStep(layout, counts, recipe.model.mtp_loss_scale)
    rate = learning_rate(recipe.optimizer, step, recipe.total_steps, recipe.tokens_per_step)
    measured = recipe.monitor.quantization.due(step + 1)
    if measured:
        run.context.health.start()
    result = run.engine.train_step(
        losses,
        microbatches,
        sequence_length=recipe.train.sequence_length,
        micro_batch_size=recipe.micro_batch_size,
        learning_rate=rate,
    )
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


def run(recipe: Recipe) -> int:
    """Trains, or goes on training, the run of this recipe; returns the exit status."""
    run_dir = Path(recipe.run_dir)
    with _threads(recipe):
        try:
            changes = _check_stored(recipe, run_dir)
            if (finished := _finished(recipe, run_dir)) is not None:
                print(f"{run_dir} is finished: validation loss {finished.get('eval/loss')}; choose another run.dir for a new run")
                return 0
            _check_places(recipe, run_dir)
            _train(build(recipe), changes)
        except (DataError, CheckpointError) as error:
            raise RecipeError(str(error)) from None
        finally:
            groups.shutdown()
    return 0


def _train(run: Run, changes: list[str]) -> None:
    recipe, layout = run.recipe, run.layout
    is_main = layout.rank == 0
    if is_main:
        _store_recipe(recipe, run.run_dir)
        _store_tokenizer(run.data, run.run_dir / "tokenizer")
    observers = open_observers(recipe.monitor) if is_main else Observers(())

    report = print if is_main else (lambda line: None)
    checkpointer = Checkpointer(run.run_dir, run.engine, run.chunks, keep=recipe.checkpoint.keep, report=report)
    step, elapsed, state = _restore(run, checkpointer)
    observers.load_state(state.get("observers", {}))
    tables = precision_tables(recipe)
    table = table_at(tables, step / recipe.total_steps)
    utilisation = open_utilisation(recipe, layout.device, layout.world_size) if is_main else None
    counted = count(recipe.model)
    observers.on_start(
        RunInfo(
            recipe=without_secrets(plain(recipe)),
            run_dir=run.run_dir,
            parameters=counted.parameters + counted.mtp,
            active_parameters=counted.active,
            step=step,
            total_steps=recipe.total_steps,
            tokens_per_step=recipe.tokens_per_step,
            resumed=step > 0,
            description=tuple(
                redacted(line)
                for line in (
                    layout.describe(),
                    *run.data.describe(),
                    _describe_backend(run, step),
                    *([] if utilisation is None else [utilisation.line]),
                    *(f"changed since the run began: {line}" for line in changes),
                )
            ),
            precision_table=table.text,
        )
    )
    last, save_every = recipe.last_step, recipe.save_every
    eval_every, log_every = recipe.train.eval_every, recipe.train.log_every
    started, evaluated, skipped = time.perf_counter() - elapsed, None, 0
    saved = step
    while step < last:
        table = table_at(tables, step / recipe.total_steps)
        formats_change = step > 0 and table is not table_at(tables, (step - 1) / recipe.total_steps)
        if formats_change:
            observers.on_formats(step + 1, table.text)
        observers.on_step_begin(step + 1)
        begin = time.perf_counter()
        metrics = train_step(run, step)
        step += 1
        seconds = time.perf_counter() - begin
        skipped = 0 if metrics.pop("taken") else skipped + 1
        if skipped:
            observers.on_skipped(step, metrics["grad_norm"])
        if skipped >= MAX_SKIPPED:
            raise SystemExit(
                f"error: gradients were not finite in {skipped} consecutive steps, the last one step {step}; weights are those of step "
                f"{step - skipped}: resume with a lower optimizer.learning_rate in a new run.dir"
            )
        if (log_every and step % log_every == 0) or step in (1, last) or formats_change or recipe.monitor.quantization.due(step):
            observers.on_step(
                {
                    "step": step,
                    "tokens": step * recipe.tokens_per_step,
                    **metrics,
                    **_pace(run, seconds),
                    **({} if utilisation is None else utilisation.metrics(table.shares, seconds)),
                    **table.metrics(),
                }
            )
        if (eval_every and step % eval_every == 0) or step == last:
            evaluated = evaluate(run, step)
            if evaluated is not None:
                observers.on_evaluation({"step": step, "tokens": step * recipe.tokens_per_step, "eval/loss": evaluated})
        if (save_every and step % save_every == 0) or step == last:
            kept = {"elapsed": time.perf_counter() - started, "observers": observers.state()}
            path = checkpointer.save(step, kept, tokens=step * recipe.tokens_per_step)
            saved = step
            observers.on_checkpoint(step, path)
    assert saved == step
    seconds = time.perf_counter() - started
    summary: dict[str, Any] = {
        "step": step,
        "tokens": step * recipe.tokens_per_step,
        "seconds": seconds,
        "session_seconds": seconds - elapsed,
    }
    if evaluated is None:
        evaluated = evaluate(run, step)
    if evaluated is not None:
        summary["eval/loss"] = evaluated
    if step < recipe.total_steps:
        summary["stopped"] = f"run.stop_after={recipe.run.stop_after}"
    elif is_main:
        baselines = run.data.count_baselines()
        if baselines is not None:
            summary |= {"baseline/bigram": baselines.bigram, "baseline/trigram": baselines.trigram}
        _write_json(run.run_dir / "finished.json", summary)
    observers.on_end(summary)


# -- pieces of the above --------------------------------------------------------------------------------------------------------------


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


def _pace(run: Run, seconds: float) -> dict[str, float | int]:
    if run.layout.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "step_seconds": seconds,
        "tokens_per_second": run.recipe.tokens_per_step / seconds,
        "memory_peak_bytes": peak,
    }


@contextmanager
def _threads(recipe: Recipe) -> Iterator[None]:
    """CPU threads: as the recipe or OMP_NUM_THREADS says; several ranks on one machine share its cores."""
    before = torch.get_num_threads()
    wanted = recipe.train.threads
    if wanted is None and "OMP_NUM_THREADS" not in os.environ:
        wanted = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_stored(recipe: Recipe, run_dir: Path) -> list[str]:
    """What this start changes of a run that already exists; [] for a new one."""
    stored = run_dir / "recipe.yaml"
    if not stored.exists():
        return []
    try:
        values = yaml.safe_load(stored.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{stored} cannot be read ({error}): restore it, or choose another run.dir") from None
    return changed_keys(values, recipe)


def _finished(recipe: Recipe, run_dir: Path) -> dict[str, Any] | None:
    """The summary of a run that is already done."""
    marker = run_dir / "finished.json"
    if not marker.exists():
        return None
    try:
        summary = json.loads(marker.read_text())
        return summary if summary["step"] == recipe.total_steps else None
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"{marker} is damaged: remove it to go on from the last checkpoint, or choose another run.dir") from None


def _check_places(recipe: Recipe, run_dir: Path) -> None:
    """What would only show when the model is built: a directory that cannot be written, a checkpoint to start from that is not there."""
    nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        why = "is no directory" if not nearest.is_dir() else "may not be written"
        raise RecipeError(f"run.dir={run_dir} cannot be used, because {nearest} {why}: choose another run.dir")
    if recipe.checkpoint.initialize_from is not None:
        open_checkpoint(recipe.checkpoint.initialize_from)
    metrics = run_dir / FILE_NAME
    if metrics.exists():
        try:
            decode_lines(metrics.read_bytes())
        except ValueError as error:
            raise RecipeError(f"{metrics} is damaged ({error}): restore or remove it before resuming") from None


def _store_recipe(recipe: Recipe, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    target = run_dir / "recipe.yaml"
    if not target.exists():
        partial = target.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(without_secrets(plain(recipe)), sort_keys=False))
        partial.replace(target)


def _store_tokenizer(data: TextData, directory: Path) -> None:
    """What an export or a later evaluation needs to read this run's tokens."""
    if not (directory / "facts.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        data.tokenizer.save(directory)
        facts = {"end_of_document": data.tokenizer.end_of_document, "vocab_size": data.tokenizer.vocab_size}
        _write_json(directory / "facts.json", facts)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
