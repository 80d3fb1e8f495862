"""What a run that goes on may change of its recipe.

Steps that were taken stay what they were, so a change is allowed when nothing they depended on moves:

    freely          where a run lies, what watches it, how it is laid out over ranks and microbatches, when it saves and evaluates
    conditionally   its length and what depends on it: where every step done keeps its learning rate, its formats and its samples
    on purpose      keys of the optimizer, and data.phases, that run.allow names: from the next step on
    never           everything else: it describes the computation that is being continued
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from model.count import linear_modules
from model.pattern import without_parts
from train.duration import Duration
from train.evaluation.base import EVALUATORS
from train.observe.redact import without_secrets
from train.optimizer import learning_rate
from train.recipe.phases import PHASES, going_on
from train.recipe.reading import RecipeError, flatten, plain, read
from train.recipe.tree import ALLOWABLE, Recipe

FREELY = (
    "run.dir",
    "run.name",
    "run.stop_after",
    "run.allow",
    "train.log_every",
    "train.eval_every",
    "train.threads",
    "train.micro_batch_size",
    "parallel.*",
    "evaluation.*",
    "checkpoint.*",
    "monitor.*",
    "cluster.*",
    "data.cache",
)
LENGTH = ("train.steps", "train.tokens")
SCHEDULE = ("optimizer.learning_rate", "optimizer.min_learning_rate", "optimizer.warmup", "optimizer.decay", "optimizer.decay_style")
PATTERN = "model.pattern"
DURATIONS = ("optimizer.warmup", "optimizer.decay", "checkpoint.every", "checkpoint.keep_every", "run.stop_after")


def changed_keys(stored: Mapping[str, Any], recipe: Recipe, done: int, samples: int | None = None) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} of what this start changes of the run whose recipe was stored, after `done` steps.

    samples: that are behind the run, read or passed over; None: it passed over none. A key that the stored recipe does not know has had its
    default. Raises RecipeError, in one sentence, for what may not change.
    """
    old = _read(stored, recipe)
    recipe = _with_phases(old, recipe, done, samples)
    before, after = (dict(flatten(without_secrets(plain(which)))) for which in (old, recipe))  # secrets were not stored
    changes = {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not (key in DURATIONS and _same_length(key, before, after, old, recipe))
    }
    for key, (was, now) in changes.items():
        conditional = key in (*LENGTH, *SCHEDULE, PHASES)
        if key == PATTERN and without_parts(str(was)) == without_parts(str(now)):
            continue  # the same layers on other stages
        if not (conditional or key in recipe.run.allow or any(fnmatchcase(key, pattern) for pattern in FREELY)):
            hint = f", or say that it is meant with run.allow=[{key}]" if key in ALLOWABLE else ""
            raise RecipeError(
                f"{key}={now!r} differs from {was!r}, with which the run in {recipe.run_dir} began: set it back to continue that run{hint}, "
                "or choose another run.dir for a new one"
            )
    if recipe.total_steps < done:
        raise RecipeError(
            f"the run in {recipe.run_dir} has done {done} steps, more than the {recipe.total_steps} of {_length(recipe)}: train longer"
        )
    _keep_learning_rates(old, recipe, done, changes)
    _keep_formats(old, recipe, done)
    return changes


def continued(stored: Mapping[str, Any], recipe: Recipe, done: int, samples: int | None = None) -> Recipe:
    """The recipe as the run goes on with it after `done` steps: data.phases that run.allow names take over where reading stopped.

    samples: see `changed_keys`. Raises RecipeError, in one sentence, for phases that are not allowed.
    """
    return _with_phases(_read(stored, recipe), recipe, done, samples)


def lines(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """`key: old -> new` for a person."""
    return [f"{key}: {was} -> {now}" for key, (was, now) in changes.items()]


def _read(stored: Mapping[str, Any], recipe: Recipe) -> Recipe:
    # What measured the run is not needed to go on with it, so it need not be registered any more.
    measured = {key: value for key, value in (stored.get("evaluation") or {}).items() if key in ("evaluators", *EVALUATORS)}
    try:
        return read(Recipe, {**stored, "evaluation": measured})
    except RecipeError as error:
        raise RecipeError(f"the recipe stored in {recipe.run_dir} cannot be read ({error}): choose another run.dir") from None


def _with_phases(old: Recipe, recipe: Recipe, done: int, samples: int | None) -> Recipe:
    taken, length = done * recipe.train.global_batch_size, recipe.train.sequence_length
    samples = taken if samples is None else samples
    phases = going_on(old.data.phases, recipe.data.phases, samples, length, PHASES in recipe.run.allow)
    if phases is None:
        passed = f" ({samples - taken} of them passed over)" if samples > taken else ""
        raise RecipeError(
            f"data.phases differ from those of the run in {recipe.run_dir} within the {samples} samples its {done} steps have read{passed}: append "
            f"a phase behind them, let these phases take over from the next step on with run.allow=[{PHASES}], or {_elsewhere(recipe)}"
        )
    return recipe if phases == recipe.data.phases else replace(recipe, data=replace(recipe.data, phases=phases))


def _same_length(key: str, before: Mapping[str, Any], after: Mapping[str, Any], old: Recipe, recipe: Recipe) -> bool:
    """Whether both are as many steps: 260 steps and 54.2% may be the same."""
    was, now = before.get(key), after.get(key)
    return was is not None and now is not None and old.in_steps(Duration.read(was)) == recipe.in_steps(Duration.read(now))


def _length(recipe: Recipe) -> str:
    train = recipe.train
    return f"train.steps={train.steps}" if train.steps is not None else f"train.tokens={train.tokens}"


def _elsewhere(recipe: Recipe) -> str:
    return f"start a run of its own from these weights, with checkpoint.initialize_from={recipe.run_dir} and another run.dir"


def _keep_learning_rates(old: Recipe, recipe: Recipe, done: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises where a step done would have had another learning rate, except by keys that run.allow names."""
    named = (key.removeprefix("optimizer.") for key in recipe.run.allow if key.startswith("optimizer."))
    kept = {name: getattr(old.optimizer, name) for name in named}
    compared = replace(recipe.optimizer, **kept)
    for step in range(done):
        was = learning_rate(old.optimizer, step, old.total_steps, old.tokens_per_step)
        now = learning_rate(compared, step, recipe.total_steps, recipe.tokens_per_step)
        if was != now:
            key = next((key for key in (*LENGTH, *SCHEDULE) if key in changes and key not in recipe.run.allow), "train.steps")
            before, after = changes.get(key, (None, None))
            remedy = f"say that it is meant, from the next step on, with run.allow=[{key}]" if key in ALLOWABLE else _elsewhere(recipe)
            raise RecipeError(
                f"{key}={after!r} instead of {before!r} would give step {step + 1}, one of the {done} done, the learning rate {now:.6g} instead of "
                f"{was:.6g}: set it back, or {remedy}"
            )


def _keep_formats(old: Recipe, recipe: Recipe, done: int) -> None:
    """Raises where a step done would have run in other formats: `start` and `end` as fractions move with the length of the run."""
    if old.total_steps == recipe.total_steps and old.optimizer.decay == recipe.optimizer.decay:
        return  # nothing else moves them, and precision itself may not change
    ours, theirs = recipe.policy, old.policy
    modules = [module.name for module in linear_modules(recipe.model)]
    for step in sorted({*_changes_of(theirs.times, old.total_steps, done), *_changes_of(ours.times, recipe.total_steps, done)}):
        for name in modules:
            was, now = theirs.formats(name, step / old.total_steps), ours.formats(name, step / recipe.total_steps)
            if was != now:
                in_ours, in_theirs = "/".join(map(str, now)), "/".join(map(str, was))
                raise RecipeError(
                    f"{_length(recipe)} moves precision.schedule or a rule's start or end, so step {step + 1}, one of the {done} done, would "
                    f"have run {name} in {in_ours} instead of {in_theirs}: write them in steps or tokens, or {_elsewhere(recipe)}"
                )


def _changes_of(times: list[float], total_steps: int, done: int) -> Iterator[int]:
    """The first steps (from 0) of the intervals in which formats stay the same, among the steps done."""
    for time in times:
        step = next((s for s in range(max(0, int(time * total_steps) - 1), total_steps + 1) if s / total_steps >= time), total_steps)
        if step < done:
            yield step
