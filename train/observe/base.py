"""The moments of a run an observer may hear about, and what it is told."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint.remote import Location
from train.observe.incident_settings import IncidentsConfig, ReplicasConfig
from train.observe.sample_settings import Sample, SamplesConfig

Metrics = Mapping[str, float | int]


@dataclass(frozen=True)
class QuantizationConfig:
    """When quantisation is measured, see `model.precision.health`."""

    every: int = 50
    """Steps between measurements; 0: never."""
    modules: tuple[str, ...] = ()
    """Globs over canonical module and layer names; empty: all."""

    def due(self, step: int) -> bool:
        """Whether step (from 1) is measured."""
        return self.every > 0 and step % self.every == 0


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps torch.profiler watches, see `train.observe.profiler`."""

    start: int = 10
    """The first profiled step."""
    steps: int = 0
    """How many steps are profiled; 0: none."""

    @property
    def last(self) -> int:
        """The last profiled step."""
        return self.start + self.steps - 1

    def __contains__(self, step: int) -> bool:
        return self.start <= step <= self.last


@dataclass(frozen=True)
class StragglersConfig:
    """When a rank counts as slow, see `train.stragglers`."""

    ratio: float = 1.3
    """Own time of the slowest rank over that of the median one, above which it is slow."""
    steps: int = 5
    """Logged steps in a row that the same rank is slow, after which there is an alert; 0: none."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for a value that cannot be used."""
        if not self.ratio > 1:
            raise ValueError(f"monitor.stragglers.ratio={self.ratio} must be above 1: use for instance 1.3")
        if self.steps < 0:
            raise ValueError(f"monitor.stragglers.steps={self.steps} is negative: use 0 for no alert, or for instance 5")


@dataclass(frozen=True)
class MonitorConfig:
    """The recipe's `monitor` group."""

    wandb: str = "offline"
    """Weights & Biases: offline (written below <run>/wandb only), online (also sent), or disabled."""
    wandb_project: str = "nibble"
    """Project of the W&B run."""
    wandb_entity: str | None = None
    """User or team the W&B run belongs to; null: the account's default."""
    wandb_timeout_seconds: float = 60.0
    """Seconds W&B may keep the end of a run waiting; a start is given up and tried again after as many."""
    wandb_artifacts: bool = False
    """Name each checkpoint to W&B as an artifact that says where it lies (its path or URL is sent; its bytes are neither read nor sent)."""
    wandb_report: bool = False
    """Draw the whole report when the run finishes and show it in W&B too; false: only the picture of the losses."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, below <run>/tensorboard."""
    picture: bool = True
    """Draw <run>/report/loss.png when the run ends."""
    incidents: IncidentsConfig = field(default_factory=IncidentsConfig)
    """Numbers that go wrong, and what is done about them."""
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    """The comparison of what several ranks hold."""
    stragglers: StragglersConfig = field(default_factory=StragglersConfig)
    """Ranks that are slower than the others."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """Health of quantisation, measured every so many steps."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Texts the model makes while it is trained, for the console, W&B and the report."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """A window of steps under torch.profiler, whose trace lands below <run>/profile."""
    observers: tuple[str, ...] = ()
    """Further observers of this run, by the names under which `register_observer` knows them."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for a value that cannot be used."""
        if self.wandb not in ("offline", "online", "disabled"):
            raise ValueError(f"monitor.wandb={self.wandb!r} is unknown: use offline, online or disabled")
        if not self.wandb_project.strip():
            raise ValueError(f"monitor.wandb_project={self.wandb_project!r} is empty: name a project, for instance nibble")
        if not 0 < self.wandb_timeout_seconds <= 86400:
            raise ValueError(
                f"monitor.wandb_timeout_seconds={self.wandb_timeout_seconds} must lie above 0 and within a day: use for instance 60"
            )
        self.incidents.validate()
        self.replicas.validate()
        self.stragglers.validate()
        self.samples.validate()
        if self.quantization.every < 0:
            raise ValueError(f"monitor.quantization.every={self.quantization.every} is negative: use 0 for never, or for instance 50")
        if self.profile.start < 1:
            raise ValueError(f"monitor.profile.start={self.profile.start} must be at least 1, the first step of a run")
        if self.profile.steps < 0:
            raise ValueError(f"monitor.profile.steps={self.profile.steps} is negative: use 0 for no profile, or for instance 3")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "monitor.tensorboard=true needs the package tensorboard, which is not installed: "
                "pip install -c constraints.txt -e '.[tensorboard]', or leave it false"
            )
        for index, name in enumerate(self.observers):
            key = f"monitor.observers[{index}]={name!r}"
            if name not in OBSERVERS:
                known = (
                    f"use one of {', '.join(OBSERVERS)}" if OBSERVERS else "register it with register_observer before the recipe is read"
                )
                raise ValueError(f"{key} is unknown: {known}")
            if name in self.observers[:index]:
                raise ValueError(f"{key} is named twice: leave one out")


@dataclass(frozen=True)
class Parent:
    """Where a branch comes from.

    run_dir: of the run it left; checkpoint: the one it began at, after `step` steps; wandb_id: of that run, where it has one; changes: {key: [the
    parent's value, the branch's]}.
    """

    run_dir: str
    checkpoint: str
    step: int
    wandb_id: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunInfo:
    """What is known about a run before its first step.

    `step` is the last step already done (0 for a new run); `tokens_per_step` counts the tokens of one global batch;
    `description` holds lines for a person (data, layout, device); `precision_table` is the text of
    `train.precision_table.PrecisionTable`; `layers` names the mixer of each layer of the main stack;
    `facts` are those of `train.run_facts`: layout, plan, code; `parent` is
    that of a branch.
    """

    recipe: dict[str, Any]
    run_dir: Path
    parameters: int
    active_parameters: int
    step: int
    total_steps: int
    tokens_per_step: int
    resumed: bool = False
    description: tuple[str, ...] = ()
    precision_table: str = ""
    layers: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    parent: Parent | None = None


@dataclass(frozen=True)
class Alert:
    """What a person should know at once.

    kind: names the sort, such as checkpoint, straggler or spike; step: the last one done; text: one sentence; severe: the run's result is in
    danger, and not only its pace.
    """

    kind: str
    step: int
    text: str
    severe: bool = False


class Observer:
    """A listener beside the loop: every hook is optional and none may change the run.

    `metrics` are keyed by the metric names of the architecture, always with `step` and `tokens`; values are plain
    Python numbers. `state()` goes into the checkpoint (JSON values only) and comes back through `load_state` *before*
    `on_start`. A run ends with `on_end` or with `on_error`, never with both, and always with one `close`. A hook that
    raises stops neither the run nor other observers (see `train.observe.opening`).
    """

    def on_start(self, run: RunInfo) -> None: ...

    def on_step_begin(self, step: int) -> None:
        """Step `step` (from 1) is the next to be taken, logged or not."""

    def on_formats(self, step: int, precision_table: str) -> None:
        """The precision schedule changes formats with this step (from 1), the next one taken."""

    def on_step(self, metrics: Metrics) -> None:
        """A logged step (every `train.log_every` steps)."""

    def on_skipped(self, step: int, grad_norm: float) -> None:
        """A step that was not taken, because its loss or gradients were not finite."""

    def on_alert(self, alert: Alert) -> None:
        """Something happened that a person should know of at once."""

    def on_rewind(self, step: int, to: int) -> None:
        """The run goes back from step `step` to its checkpoint of step `to`; what was told of later steps is void."""

    def on_evaluation(self, metrics: Metrics) -> None:
        """An evaluation: `step`, `tokens`, and what the evaluators measured, such as `eval/loss`."""

    def on_samples(self, metrics: Metrics, samples: Sequence[Sample]) -> None:
        """Texts the model has made: `step`, `tokens`, `seconds/samples`, and a text for each prompt of the recipe."""

    def on_checkpoint(self, step: int, path: Location) -> None: ...

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run finished, or stopped in good order. `summary` may hold `step`, `tokens`, `eval/loss`, `baseline/trigram`, `seconds`,
        `stopped` (why the run ended before its last step; absent when it finished), `signal` (the name of the signal that asked for it)."""

    def on_error(self, error: BaseException) -> None:
        """The run failed with this error, on this rank or on another; its message is a sentence."""

    def close(self) -> None:
        """The last call, once, whatever happened: releases files, threads and services."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None: ...


OBSERVERS: dict[str, Callable[[MonitorConfig], Observer]] = {}
"""What `register_observer` was told, by name."""


def register_observer(name: str, factory: Callable[[MonitorConfig], Observer]) -> None:
    """Makes `monitor.observers=[name]` possible: `factory` is called once a run, on rank 0, with the recipe's `monitor` group.

    Raises ValueError for a name that is taken.
    """
    if name in OBSERVERS:
        raise ValueError(f"an observer named {name!r} is registered already: choose another name")
    OBSERVERS[name] = factory
