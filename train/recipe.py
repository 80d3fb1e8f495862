"""The recipe: one tree of frozen dataclasses that describes a whole run.

Groups live beside the component they configure (`model.config`, `model.precision.policy`, `parallel.layout`, `data.config`, ...); here is what
belongs to the run itself, and the checks that need more than one group. A recipe is validated whole, before anything is allocated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from data.config import DataConfig
from model.config import ModelConfig
from model.count import linear_modules
from model.precision.policy import Policy, PrecisionConfig
from parallel.layout import ParallelConfig
from train.duration import Duration
from train.observe import MonitorConfig
from train.observe.redact import without_secrets
from train.reading import RecipeError, flatten, plain, read
from train.schedule import OptimizerConfig


@dataclass(frozen=True)
class RunConfig:
    """name, dir: of the run; dir null: runs/<name>. seed: of weights, data order and random bits. stop_after: end early, with a
    checkpoint, without changing the schedule."""

    name: str = "run"
    dir: str | None = None
    seed: int = 1
    stop_after: Duration | None = None


@dataclass(frozen=True)
class TrainConfig:
    """steps or tokens (the other is derived). Batch sizes are in sequences; log_every and eval_every in steps, 0: never."""

    global_batch_size: int
    micro_batch_size: int
    sequence_length: int
    steps: int | None = None
    tokens: Duration | None = None
    log_every: int = 10
    eval_every: int = 0
    threads: int | None = None  # CPU threads; null: one per core, or what OMP_NUM_THREADS says


@dataclass(frozen=True)
class CheckpointConfig:
    """every: null: only at the end. keep: newest checkpoints that stay, null: all. initialize_from: a checkpoint whose weights a new run
    starts from."""

    every: Duration | None = None
    keep: int | None = 2
    asynchronous: bool = False
    initialize_from: str | None = None


@dataclass(frozen=True)
class Recipe:
    train: TrainConfig
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig = field(default_factory=RunConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.train.sequence_length

    @property
    def total_steps(self) -> int:
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return self.train.tokens.steps(self.tokens_per_step)

    @property
    def policy(self) -> Policy:
        """Which module runs which GEMM in which format, and when. Raises ValueError, in one sentence, for what cannot be honoured."""
        return Policy(self.precision.timed(self._fraction_of_run), len(self.model.layers))

    def _fraction_of_run(self, key: str, text: str) -> float:
        """`2000steps`, `20T tokens` or `decay` as the fraction of the run that is behind us when that moment comes."""
        if text == "decay":
            steps = self.total_steps - self.optimizer.decay.steps(self.tokens_per_step)
            if steps == self.total_steps:
                raise ValueError(f"{key}=decay, but optimizer.decay is 0: give the decay a length, or {key} a fraction of the run")
        else:
            try:
                steps = Duration.read(text).steps(self.tokens_per_step)
            except ValueError:
                raise ValueError(
                    f"{key}={text!r} is no moment of the run: write a fraction (0.82), a duration (2000steps, 20T tokens) or decay"
                ) from None
        # Both are divided the same way by whoever asks, so a format changes exactly at its step.
        return steps / self.total_steps

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"


def read_recipe(values: Mapping[str, Any], world_size: int | None) -> Recipe:
    """A validated recipe for a run of `world_size` ranks, or of the fewest it can run on (None).

    Raises RecipeError: one sentence with key, value and remedy.
    """
    recipe = read(Recipe, values)
    if recipe.precision.compute == "auto":
        compute = "bf16" if torch.cuda.is_available() else "fp32"
        recipe = replace(recipe, precision=replace(recipe.precision, compute=compute))
    try:
        validate(recipe, recipe.parallel.fewest_ranks() if world_size is None else world_size)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return recipe


def validate(recipe: Recipe, world_size: int) -> None:
    """Raises ValueError for values that contradict each other or that nothing here can honour."""
    recipe.model.validate()
    recipe.data.validate()
    recipe.monitor.validate()
    _validate_train(recipe, world_size)
    _validate_phases(recipe)
    recipe.parallel.validate(world_size)
    _validate_optimizer(recipe)
    _validate_rest(recipe)
    _validate_layout(recipe)
    _validate_precision(recipe)
    vocabulary = recipe.data.tokenizer.known_vocab_size()
    if vocabulary is not None and vocabulary > recipe.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={recipe.model.vocab_size} is smaller than the tokenizer's {vocabulary} tokens: set model.vocab_size to at "
            f"least {vocabulary}"
        )


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{key}={value} must be at least {least}")


def _validate_train(recipe: Recipe, world_size: int) -> None:
    train = recipe.train
    for key in ("global_batch_size", "micro_batch_size", "sequence_length"):
        _at_least(f"train.{key}", getattr(train, key), 1)
    for key in ("log_every", "eval_every"):
        _at_least(f"train.{key}", getattr(train, key), 0)
    if train.threads is not None:
        _at_least("train.threads", train.threads, 1)
    if train.steps is not None and train.tokens is not None:
        raise ValueError(
            f"train.steps={train.steps} and train.tokens={train.tokens} are both given, but one follows from the other: set one to null"
        )
    if train.steps is None and train.tokens is None:
        raise ValueError("train.steps is missing: give the length of the run as train.steps or as train.tokens")
    if train.tokens is not None and train.tokens.unit != "tokens":
        raise ValueError(f"train.tokens={train.tokens} counts steps: write it in tokens, or use train.steps")
    _at_least("train.steps" if train.steps is not None else "train.tokens", recipe.total_steps, 1)
    depths = recipe.model.mtp_depths
    if train.sequence_length <= depths + 1:
        raise ValueError(
            f"train.sequence_length={train.sequence_length} is too short for the {depths} MTP depths of model.pattern: use more tokens"
        )
    parallel = recipe.parallel
    dense = parallel.tensor * parallel.pipeline * parallel.context
    if dense >= 1 and world_size % dense == 0:
        unit = train.micro_batch_size * parallel.data(world_size)
        if unit and train.global_batch_size % unit:
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size={train.micro_batch_size} "
                f"times {parallel.data(world_size)} data-parallel ranks: use a multiple of {unit}"
            )


def _validate_phases(recipe: Recipe) -> None:
    """Phases that end must reach the end of the run."""
    phases, length = recipe.data.phases, recipe.train.sequence_length
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
    optimizer, per_step = recipe.optimizer, recipe.tokens_per_step
    if not optimizer.learning_rate > 0:
        raise ValueError(f"optimizer.learning_rate={optimizer.learning_rate} must be positive")
    if not 0 <= optimizer.min_learning_rate <= optimizer.learning_rate:
        raise ValueError(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} must lie between 0 and optimizer.learning_rate="
            f"{optimizer.learning_rate}"
        )
    warmup, decay = optimizer.warmup.steps(per_step), optimizer.decay.steps(per_step)
    if warmup + decay > recipe.total_steps:
        raise ValueError(
            f"optimizer.warmup={optimizer.warmup} ({warmup} steps) and optimizer.decay={optimizer.decay} ({decay} steps) are longer than "
            f"the run of {recipe.total_steps} steps: shorten them or train longer"
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
    if checkpoint.asynchronous:
        raise ValueError("checkpoint.asynchronous=true is not available: use checkpoint.asynchronous=false")
    if checkpoint.keep is not None:
        _at_least("checkpoint.keep", checkpoint.keep, 1)
    for key, duration in (("checkpoint.every", checkpoint.every), ("run.stop_after", run.stop_after)):
        if duration is not None and duration.count < 1:
            raise ValueError(f"{key}={duration} must be at least one step: use null for never")
    if not 0 <= run.seed < 2**63:
        raise ValueError(f"run.seed={run.seed} must lie between 0 and 2^63 - 1")
    if not run.name.strip() or "/" in run.name:
        raise ValueError(f"run.name={run.name!r} must be a plain name without slashes: use run.dir for a place")


def _validate_layout(recipe: Recipe) -> None:
    model, parallel, train = recipe.model, recipe.parallel, recipe.train
    letters = set(model.pattern) - {"/"}
    tensor = parallel.tensor
    divided: list[tuple[str, int | None]] = [("model.vocab_size", model.vocab_size)]
    if "*" in letters:
        divided += [("model.attention_heads", model.attention_heads), ("model.key_value_heads", model.key_value_heads)]
    if "M" in letters:
        divided += [("model.mamba_heads", model.mamba_heads), ("model.mamba_groups", model.mamba_groups)]
    if "-" in letters:
        divided.append(("model.ffn_hidden_size", model.ffn_hidden_size))
    if "E" in letters:
        divided.append(("model.shared_expert_ffn_size", model.shared_expert_ffn_size))
    for key, value in divided:
        assert value is not None  # model.validate has seen to it
        if value % tensor:
            raise ValueError(f"{key}={value} is not a multiple of parallel.tensor={tensor}: change one of them")
    if parallel.sequence_parallel and train.sequence_length % tensor:
        raise ValueError(
            f"train.sequence_length={train.sequence_length} is not a multiple of parallel.tensor={tensor}, which splits sequences: change "
            "one of them, or set parallel.sequence=false"
        )
    if "E" in letters:
        assert model.experts is not None
        if model.experts % parallel.expert:
            raise ValueError(f"model.experts={model.experts} is not a multiple of parallel.expert={parallel.expert}: change one of them")
        if tensor > 1 and not parallel.sequence_parallel:
            raise ValueError(
                "parallel.sequence=false with parallel.tensor > 1 cannot run MoE layers (E in model.pattern): set parallel.sequence=true"
            )
    elif parallel.expert > 1:
        raise ValueError(f"parallel.expert={parallel.expert} needs MoE layers, but model.pattern={model.pattern!r} has no E: use 1")
    if parallel.pipeline > len(model.layers):
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} exceeds the {len(model.layers)} layers of model.pattern: use at most that many stages"
        )


def _validate_precision(recipe: Recipe) -> None:
    """Every module must be able to run every format it will be asked for, at any time of the run."""
    model, precision, parallel = recipe.model, recipe.precision, recipe.parallel
    policy = recipe.policy
    modules = linear_modules(model, parallel.tensor)
    policy.check([module.name for module in modules])
    tokens = recipe.train.micro_batch_size * recipe.train.sequence_length
    for time in policy.times:
        for module in modules:
            formats = dict(zip(("fprop", "dgrad", "wgrad"), policy.formats(module.name, time), strict=True))
            names = {form.name for form in formats.values()}
            if module.name.endswith(".gate") and names - {"fp32", "bf16"}:
                raise ValueError(
                    f"precision asks for {'/'.join(sorted(names - {'fp32', 'bf16'}))} in the router {module.name}: routers run in fp32 or bf16 "
                    "only, so add a rule with modules=['*.gate'] and format=fp32"
                )
            nvfp4 = {gemm for gemm, form in formats.items() if form.name == "nvfp4"}
            options = precision.nvfp4
            if nvfp4 & {"fprop", "dgrad"} and options.weight_scaling == "2d" and (module.rows % 16 or module.columns % 16):
                raise ValueError(
                    f"precision asks for nvfp4 in {module.name}, whose weight on one rank is {module.rows} x {module.columns}: 2d scaling "
                    "needs multiples of 16, so change model sizes, set precision.nvfp4.weight_scaling=1d, or give it another format"
                )
            local = tokens // parallel.tensor if module.sequence_split and parallel.sequence_parallel else tokens
            if "wgrad" in nvfp4 and options.hadamard and not module.routed and local % 16:
                raise ValueError(
                    f"train.micro_batch_size={recipe.train.micro_batch_size} times train.sequence_length={recipe.train.sequence_length} "
                    f"gives {module.name} {local} tokens, but the Hadamard transform of its wgrad works on groups of 16: use a multiple "
                    "of 16 or precision.nvfp4.hadamard=false"
                )


def validate_transformer_engine(recipe: Recipe) -> None:
    """Raises ValueError for what Transformer Engine cannot do, where it is there."""
    precision, policy = recipe.precision, recipe.policy
    modules = linear_modules(recipe.model)
    nvfp4 = any("nvfp4" in map(str, policy.formats(module.name, time)) for module in modules for time in policy.times)
    if nvfp4 and precision.nvfp4.hadamard and precision.compute != "bf16":
        raise ValueError(
            f"precision.compute={precision.compute} with precision.backend=transformer_engine cannot rotate operands, which Transformer Engine does "
            "in bf16 only: use precision.compute=bf16, precision.nvfp4.hadamard=false or precision.backend=triton"
        )
    if nvfp4 and precision.nvfp4.row_scaled and precision.amax_scope == "tensor_parallel":
        raise ValueError(
            "precision.amax_scope=tensor_parallel with precision.nvfp4.row_scaled=true cannot run with precision.backend=transformer_engine, which "
            "takes the amax of every row itself: use precision.amax_scope=local or precision.backend=triton"
        )


# Keys a resumed run may change; everything else describes the computation that is being continued.
MAY_CHANGE = (
    "run.dir",
    "run.name",
    "run.stop_after",
    "train.log_every",
    "train.eval_every",
    "train.threads",
    "checkpoint.*",
    "monitor.*",
    "data.cache",
    "parallel.timeout_minutes",
)


def changed_keys(stored: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Lines `key: old -> new` of what a resume changes. Raises RecipeError for a key that must stay as the run began."""
    old, new = dict(flatten(stored)), dict(flatten(without_secrets(plain(recipe))))  # as it was stored
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if not any(fnmatchcase(key, allowed) for allowed in MAY_CHANGE):
            raise RecipeError(
                f"{key}={after!r} differs from {before!r}, with which the run in {recipe.run_dir} began: set it back to continue that run, "
                "or choose another run.dir for a new one"
            )
        lines.append(f"{key}: {before} -> {after}")
    return lines
