"""The engine: data parallelism, gradient accumulation, clipping and the optimizer around the model, behind one interface.

One optimizer step is

    schedule (microbatches, pipeline) -> reduce gradients -> finite? -> clip -> optimizer on fp32 masters

Gradients are accumulated and reduced in fp32 and only ever added: the loss is normalised over the global batch before the backward pass.
A step whose gradients are not finite on some rank, or which some rank objects to, is taken by no rank.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Optimizer:
    """What an engine must know of an optimizer whose update of an element depends on that element's own history alone.

    make: parameter groups (dicts with `params` and what the engine keeps beside them) -> torch's optimizer over fp32 masters, or over
        parts of flattened masters.
    room: a master -> the state `make`'s optimizer will keep for it, by name, as before its first step: tensors of the master's shape, or of
        none (numbers).
    group_numbers: numbers it keeps once in its parameter groups, by name.
    weight_decay: never touches tensors of one dimension. clip: the norm gradients are clipped to.
    """

    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    room: Callable[[Tensor], dict[str, Tensor]]
    group_numbers: tuple[str, ...] = ()
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class ModelSizes:
    """What an engine must know of the model: hidden_size of what a pipeline stage passes on, [sequence, batch, hidden], in params_dtype;
    experts: None without MoE layers."""

    params_dtype: torch.dtype
    hidden_size: int
    layers: int = 1
    attention_heads: int = 1
    experts: int | None = None
    top_k: int = 1


@dataclass(frozen=True)
class StepResult:
    """grad_norm: of the whole model's gradient before clipping; taken: False when it was not finite and nothing was updated."""

    grad_norm: float
    taken: bool


@dataclass
class ParameterState:
    """What the optimizer on this rank keeps for one model parameter.

    master, tensors (by name): of the parameter's shape; with a flat_range (start, stop), 1-D: elements start ... stop - 1 of the flattened
    parameter (a sharded optimizer's part). They are the optimizer's own memory, so that a checkpoint can fill them. master is None where
    the weight itself is fp32. numbers, by name, are copies; both are empty before the first step.
    """

    param: nn.Parameter
    master: Tensor | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    flat_range: tuple[int, int] | None = None


def unmarked(phase: str) -> None:
    """Nobody measures the phases of a step."""


def always() -> bool:
    """Nobody objects to a step."""
    return True


class ForwardStep(Protocol):
    """(microbatches, model chunk) -> (output, loss function), called once a microbatch; see `train.step.LossStep`."""

    def __call__(self, microbatches: Iterator[Any], model: nn.Module) -> tuple[Tensor, Any]: ...


class Stateful(Protocol):
    """What saving and restoring a run needs of an engine."""

    def settle(self) -> None:
        """Makes the weights on this rank those of the last step, where the engine gathers them while the next one begins: to be called before
        anything but `train_step` reads or fills them. Collective."""
        ...

    def parameter_states(self) -> Iterable[ParameterState]:
        """The optimizer's state on this rank, beside the parameter it belongs to."""
        ...

    def make_room(self, number: Callable[[nn.Parameter, str], float]) -> None:
        """Makes the state the optimizer has after its first step: tensors of zeros, to be filled through `parameter_states`, and
        the numbers that `number(parameter, name)` says."""
        ...


class Engine(Stateful, Protocol):
    """Trains the model chunks of this rank (one, or several with a virtual pipeline), each a module of (microbatch, input) -> output.

    `input`: what the stage before passed on, None for the first. `shared_weight`: of a chunk, see `parallel.shards`.
    """

    def train_step(
        self,
        forward_step: ForwardStep,
        microbatches: Sequence[Any],
        *,
        sequence_length: int,
        micro_batch_size: int,
        learning_rate: float,
        mark: Callable[[str], None] = unmarked,
        agreed: Callable[[], bool] = always,
    ) -> StepResult:
        """One optimizer step over `microbatches`; every rank of a pipeline passes the same ones. mark: is called with the name of each phase
        that ends, forward_backward and optimizer. agreed: is asked once gradients are there; when it says no on any rank, the step is taken
        by none, as if gradients were not finite."""
        ...

    def evaluate(
        self, forward_step: ForwardStep, microbatches: Iterator[Any], count: int, *, sequence_length: int, micro_batch_size: int
    ) -> None:
        """Forward passes alone over `count` microbatches, through the same schedule; results are left in `forward_step`."""
        ...

    def reload_masters(self) -> None:
        """Makes the fp32 masters equal the model's weights, after weights alone were loaded."""
        ...

    def update_masters(self, changes: Mapping[nn.Parameter, Callable[[Tensor], None]]) -> None:
        """Between two steps: hands each function the whole fp32 master of its parameter, of that parameter's shape, to change in place, and makes
        the weights follow. Collective: data-parallel ranks pass the same parameters in the same order, and change them alike."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds besides the model. The process groups are not its own."""
        ...
