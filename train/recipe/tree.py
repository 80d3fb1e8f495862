"""The recipe: one tree of frozen dataclasses that describes a whole run.

Groups live beside the component they configure (`model.config`, `model.precision.policy`, `parallel.layout`, `data.config`, ...); here is what
belongs to the run itself, and the checks that need more than one group. A recipe is validated whole, before anything is allocated.
"""

from dataclasses import dataclass, field

from data.config import DataConfig
from model.config import ModelConfig
from model.precision.policy import Policy, PrecisionConfig
from parallel.cluster import ClusterConfig
from parallel.layout import ParallelConfig
from train.observe import MonitorConfig
from train.optimizer import OptimizerConfig
from train.recipe.duration import Duration


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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

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
