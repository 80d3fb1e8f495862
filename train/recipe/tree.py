"""The recipe: one tree of frozen dataclasses that describes a whole run.

Groups live beside the component they configure (`model.config`, `model.precision.policy`, `parallel.layout`, `data.config`, ...); here is what
belongs to the run itself, and the checks that need more than one group. A recipe is validated whole, before anything is allocated.
"""

from dataclasses import dataclass, field
from typing import Literal

from data.config import DataConfig
from model.config import ModelConfig
from model.precision.policy import Policy, PrecisionConfig
from parallel.cluster import ClusterConfig
from parallel.layout import ParallelConfig
from train.checkpoint.retention import Retention
from train.duration import Duration
from train.evaluation import EvaluationConfig
from train.observe import MonitorConfig
from train.optimizer import OptimizerConfig

ALLOWABLE = (
    *(
        f"optimizer.{name}"
        for name in ("learning_rate", "min_learning_rate", "warmup", "decay", "decay_style", "weight_decay", "clip", "betas", "eps")
    ),
    "data.phases",
)
"""What run.allow may name."""


@dataclass(frozen=True)
class RunConfig:
    """The recipe's `run` group: what the run is called, where it lies and what it draws from."""

    name: str = "run"
    """Of the run, in the console, W&B and the report."""
    dir: str | None = None
    """The run directory; null: runs/<run.name>. Started again with the same directory, a run continues."""
    seed: int = 1
    """Of initial weights, data order and random bits."""
    stop_after: Duration | None = None
    """End early, with a checkpoint, without changing the schedule; null: at the last step."""
    parent: str | None = None
    """The checkpoint of another run a branch begins at, weights, optimizer and step; set by train.branch; null: no branch."""
    allow: tuple[str, ...] = ()
    """Keys of the optimizer, or data.phases, that a run which goes on may change on purpose, from its next step on, as in
    [optimizer.learning_rate]."""


@dataclass(frozen=True)
class TrainConfig:
    """The recipe's `train` group: how long, and in which batches."""

    global_batch_size: int
    """Sequences of an optimizer step, over all ranks."""
    sequence_length: int
    """Tokens of a sequence."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Sequences one rank computes at a time; auto: the largest divisor of its share of the global batch that holds at most 2048 tokens."""
    steps: int | None = None
    """Length of the run in optimizer steps; null: as train.tokens says."""
    tokens: Duration | None = None
    """Length of the run in tokens, rounded up to a whole step; null: as train.steps says."""
    log_every: int = 10
    """Steps from one logged step to the next; 0: only the first and the last."""
    eval_every: int = 0
    """Steps from one evaluation to the next; 0: only at the end."""
    only: Literal["mtp"] | None = None
    """What is trained: mtp, the MTP depths alone, on the unchanged trunk of checkpoint.initialize_from or a branch's parent; null: everything."""
    threads: int | None = None
    """CPU threads of a rank; null: as OMP_NUM_THREADS says, or the machine's cores divided among its ranks."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The recipe's `checkpoint` group."""

    every: Duration | None = None
    """From one checkpoint to the next; null: only at the end."""
    keep: int | None = 2
    """Newest checkpoints that stay on disk; null: all."""
    keep_every: Duration | None = None
    """A checkpoint at each multiple of this is saved, and stays for ever; null: none."""
    milestones: tuple[Duration, ...] = ()
    """Moments of the run, as in [50%, 2000steps], whose checkpoints are saved under that name, and stay for ever."""
    asynchronous: bool | Literal["auto"] = "auto"
    """Write beside the training, which waits only for a copy into host memory; auto: where that has room for the copy."""
    storage: str | None = None
    """Where checkpoints lie: a directory of this run alone, or an fsspec URL such as s3://bucket/runs/first; null: the run directory."""
    initialize_from: str | None = None
    """A run or checkpoint whose weights a new run starts from; null: random weights."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    train: TrainConfig
    """How long a run takes and in which batches."""
    model: ModelConfig
    """The layers and their sizes."""
    data: DataConfig
    """What is read, and how it becomes tokens."""
    optimizer: OptimizerConfig
    """The optimizer and its learning rate."""
    run: RunConfig = field(default_factory=RunConfig)
    """What a run is called and where it lies."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Which module runs which GEMM in which number format, and when."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks divide the work."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When a run is saved."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured beside the training loss."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is watched and drawn."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The hardware, for launching, planning and the MFU."""

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.train.sequence_length

    @property
    def total_steps(self) -> int:
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return self.train.tokens.steps(self.tokens_per_step, 0)

    def in_steps(self, duration: Duration) -> int:
        """A duration of this run in optimizer steps."""
        return duration.steps(self.tokens_per_step, self.total_steps)

    @property
    def save_every(self) -> int:
        """Steps from checkpoint to checkpoint, at least one; 0: only at the end."""
        return self._steps_or_none(self.checkpoint.every)

    @property
    def keep_every(self) -> int:
        """Steps from one checkpoint that stays for ever to the next, at least one; 0: none does."""
        return self._steps_or_none(self.checkpoint.keep_every)

    def _steps_or_none(self, duration: Duration | None) -> int:
        return max(1, self.in_steps(duration)) if duration is not None else 0

    @property
    def retention(self) -> Retention:
        """Which checkpoints stay on disk."""
        return Retention(self.checkpoint.keep, self.keep_every)

    def milestone(self, step: int) -> str | None:
        """The name of the milestone that is reached with this step; None: none is."""
        return next((str(name) for name in self.checkpoint.milestones if self.in_steps(name) == step), None)

    def save_due(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint after this step (from 1)."""
        periods = (self.save_every, self.keep_every)
        return any(every and step % every == 0 for every in periods) or step == self.last_step or self.milestone(step) is not None

    @property
    def last_step(self) -> int:
        """The step (from 1) after which this start of the run ends."""
        stop_after = self.run.stop_after
        return self.total_steps if stop_after is None else min(self.total_steps, max(1, self.in_steps(stop_after)))

    @property
    def micro_batch_size(self) -> int:
        """In sequences. `read_recipe` has put a number where the recipe said auto."""
        assert self.train.micro_batch_size != "auto"
        return self.train.micro_batch_size

    @property
    def policy(self) -> Policy:
        """Which module runs which GEMM in which format, and when. Raises ValueError, in one sentence, for what cannot be honoured."""
        return Policy(self.precision.timed(self._fraction_of_run), len(self.model.layers))

    def _fraction_of_run(self, key: str, text: str) -> float:
        """`2000steps`, `20T tokens`, `82%` or `decay` as the fraction of the run that is behind us when that moment comes."""
        if text == "decay":
            steps = self.total_steps - self.in_steps(self.optimizer.decay)
            if steps == self.total_steps:
                raise ValueError(f"{key}=decay, but optimizer.decay is 0: give the decay a length, or {key} a fraction of the run")
        else:
            try:
                duration = Duration.read(text)
            except ValueError:
                raise ValueError(
                    f"{key}={text!r} is no moment of the run: write a fraction (0.82, 82%), a duration (2000steps, 20T tokens) or decay"
                ) from None
            if duration.unit == "%":
                return float(duration.count / 100)  # exact, as if it had been written as a fraction
            steps = self.in_steps(duration)
        # Both are divided the same way by whoever asks, so a format changes exactly at its step.
        return steps / self.total_steps

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"
