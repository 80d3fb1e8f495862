"""The checks that need more than one group of a recipe."""

from parallel.engines import check_engine
from parallel.misfit import Misfit
from train.checkpoint.remote import is_url, url_problem
from train.observe.redact import redacted
from train.optimizer import check_optimizer
from train.recipe.layout_checks import validate_layout
from train.recipe.tree import ALLOWABLE, Recipe


def validate(recipe: Recipe, ranks: int) -> None:
    """Raises ValueError for values that contradict each other or that nothing here can honour, but for formats (see `precision_checks`)."""
    validate_shape(recipe, ranks)
    recipe.data.validate()
    recipe.monitor.validate()
    recipe.evaluation.validate()
    if "acceptance" in recipe.evaluation.evaluators and not recipe.model.mtp_depths:
        raise ValueError(
            f"evaluation.evaluators names acceptance, but model.pattern={recipe.model.pattern} has no MTP depth to draft with: leave "
            "it out, or add depths as in /*E/*E"
        )
    recipe.cluster.validate()
    _validate_length(recipe)
    _validate_only(recipe)
    _validate_profile(recipe)
    _validate_phases(recipe)
    check_engine(recipe.parallel, recipe.precision.compute)
    check_optimizer(recipe.optimizer)
    _validate_optimizer(recipe)
    _validate_rest(recipe)
    vocabulary = recipe.data.tokenizer.known_vocab_size()
    if vocabulary is not None and vocabulary > recipe.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={recipe.model.vocab_size} is smaller than the tokenizer's {vocabulary} tokens: set model.vocab_size to at "
            f"least {vocabulary}"
        )


def validate_shape(recipe: Recipe, ranks: int) -> None:
    """Model, batches and layout, which must fit each other and the number of ranks: quick, so that other values can be tried."""
    recipe.model.validate()
    train, depths = recipe.train, recipe.model.mtp_depths
    _at_least("train.global_batch_size", train.global_batch_size, 1)
    _at_least("train.sequence_length", train.sequence_length, 1)
    if train.micro_batch_size != "auto":
        _at_least("train.micro_batch_size", train.micro_batch_size, 1)
    if train.sequence_length <= depths + 1:
        raise Misfit(
            f"train.sequence_length={train.sequence_length} is too short for the {depths} MTP depths of model.pattern",
            "train.sequence_length",
        )
    validate_layout(recipe, ranks)


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise Misfit(f"{key}={value} must be at least {least}", key)


def _validate_length(recipe: Recipe) -> None:
    train = recipe.train
    _at_least("train.log_every", train.log_every, 0)
    _at_least("train.eval_every", train.eval_every, 0)
    if train.threads is not None:
        _at_least("train.threads", train.threads, 1)
    if train.steps is not None and train.tokens is not None:
        raise ValueError(
            f"train.steps={train.steps} and train.tokens={train.tokens} are both given, but one follows from the other: set one to null"
        )
    if train.steps is None and train.tokens is None:
        raise ValueError("train.steps is missing: give the length of the run as train.steps or as train.tokens")
    if train.tokens is not None and train.tokens.unit != "tokens":
        raise ValueError(f"train.tokens={train.tokens} counts no tokens: write for instance 2.5M tokens, or use train.steps")
    _at_least("train.steps" if train.steps is not None else "train.tokens", recipe.total_steps, 1)


def _validate_only(recipe: Recipe) -> None:
    """Heads are trained alone on a trunk that is there, by an engine that leaves out what has no gradient."""
    if recipe.train.only is None:
        return
    if not recipe.model.mtp_depths:
        raise ValueError(
            f"train.only=mtp, but model.pattern={recipe.model.pattern} has no MTP depth: add some as in /*E/*E, or set it to null"
        )
    if recipe.checkpoint.initialize_from is None and recipe.run.parent is None:
        raise ValueError(
            "train.only=mtp would train heads on random weights: name the run whose trunk it is, as in checkpoint.initialize_from=runs/tiny, or "
            "fork it with python -m train.branch checkpoint=runs/tiny train.only=mtp"
        )
    if recipe.parallel.pipeline > 1:
        raise ValueError(
            f"train.only=mtp with parallel.pipeline={recipe.parallel.pipeline} would leave stages without anything to train: use parallel.pipeline=1"
        )
    if recipe.parallel.engine != "megatron":
        raise ValueError(f"train.only=mtp is not known to parallel.engine={recipe.parallel.engine}: use parallel.engine=megatron")


def _validate_profile(recipe: Recipe) -> None:
    profile = recipe.monitor.profile
    if profile.steps and profile.start > recipe.total_steps:
        raise ValueError(
            f"monitor.profile.start={profile.start} lies behind the run of {recipe.total_steps} steps: use {recipe.total_steps} or less"
        )


def _validate_phases(recipe: Recipe) -> None:
    """Short sequences must divide long ones, and phases that end must reach the end of the run."""
    phases, length, short = recipe.data.phases, recipe.train.sequence_length, recipe.data.alternate_length
    if short is not None and length % short:
        nearest = min((n for n in range(1, length + 1) if length % n == 0), key=lambda n: abs(n - short))
        raise ValueError(
            f"data.alternate_length={short} does not divide train.sequence_length={length} into pieces: use for instance {nearest}"
        )
    if phases[-1].tokens is None:
        return
    samples = sum(-(-phase.tokens // length) for phase in phases if phase.tokens is not None)
    needed = recipe.total_steps * recipe.train.global_batch_size
    if samples < needed:
        last = f"data.phases[{len(phases) - 1}].tokens"
        raise ValueError(
            f"data.phases end after {samples} samples of train.sequence_length={length}, but the run of {recipe.total_steps} steps takes {needed}: "
            f"lengthen {last}={phases[-1].tokens}, set it to null, or train shorter"
        )


def _validate_optimizer(recipe: Recipe) -> None:
    optimizer = recipe.optimizer
    if not optimizer.learning_rate > 0:
        raise ValueError(f"optimizer.learning_rate={optimizer.learning_rate} must be positive")
    if not 0 <= optimizer.min_learning_rate <= optimizer.learning_rate:
        raise ValueError(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} must lie between 0 and optimizer.learning_rate="
            f"{optimizer.learning_rate}"
        )
    warmup, decay = recipe.in_steps(optimizer.warmup), recipe.in_steps(optimizer.decay)
    if warmup + decay > recipe.total_steps:
        raise ValueError(
            f"optimizer.warmup={optimizer.warmup} ({warmup} steps) and optimizer.decay={optimizer.decay} ({decay} steps) are longer than "
            f"the run of {recipe.total_steps} steps: shorten them, give them as shares of the run (4%, 54%), or train longer"
        )
    for i, beta in enumerate(optimizer.betas):
        if not 0 <= beta < 1:
            raise ValueError(f"optimizer.betas[{i}]={beta} must lie in [0, 1): use for instance 0.9 and 0.95")
    if not optimizer.eps > 0:
        raise ValueError(f"optimizer.eps={optimizer.eps} must be positive")
    if optimizer.weight_decay < 0:
        raise ValueError(f"optimizer.weight_decay={optimizer.weight_decay} must not be negative: use 0 for none")
    if not optimizer.clip > 0:
        raise ValueError(f"optimizer.clip={optimizer.clip} must be positive: use a large norm to clip nothing")


def _validate_rest(recipe: Recipe) -> None:
    checkpoint, run = recipe.checkpoint, recipe.run
    if checkpoint.storage is not None and is_url(checkpoint.storage) and (problem := url_problem(checkpoint.storage)):
        raise ValueError(f"checkpoint.storage={redacted(checkpoint.storage)} {problem}")
    if checkpoint.keep is not None:
        _at_least("checkpoint.keep", checkpoint.keep, 1)
    for key, duration in (
        ("checkpoint.every", checkpoint.every),
        ("checkpoint.keep_every", checkpoint.keep_every),
        ("run.stop_after", run.stop_after),
    ):
        if duration is not None and not duration.count:
            raise ValueError(f"{key}={duration} must be at least one step: use null for never")
    for index, milestone in enumerate(checkpoint.milestones):
        if not 1 <= recipe.in_steps(milestone) <= recipe.total_steps:
            raise ValueError(
                f"checkpoint.milestones[{index}]={milestone} is step {recipe.in_steps(milestone)}, which is none of the run's "
                f"{recipe.total_steps} steps: name a moment between its first and its last"
            )
    for key in run.allow:
        if key not in ALLOWABLE:
            raise ValueError(f"run.allow=[{key}] cannot be allowed: name some of {', '.join(ALLOWABLE)}")
    if not 0 <= run.seed < 2**63:
        raise ValueError(f"run.seed={run.seed} must lie between 0 and 2^63 - 1")
    if not run.name.strip() or "/" in run.name or run.name in (".", ".."):
        raise ValueError(f"run.name={run.name!r} must be a plain name without slashes: use run.dir for a place")
