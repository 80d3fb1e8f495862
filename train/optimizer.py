"""The optimizer: which one, its constants, and its learning rate as a pure function of the step: warm-up, constant, decay (WSD).

An optimizer is registered with what an engine and a checkpoint must know of it. Its update of an element may depend on that element's own
history alone (AdamW, Lion; not Muon), because an engine may hand it flattened parts of parameters:

    register_optimizer("sgd", make=lambda groups, config, options: torch.optim.SGD(groups, config.learning_rate, momentum=0.9),
                       room=lambda master: {"momentum_buffer": torch.zeros_like(master)})
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from parallel.engine import Optimizer
from train.duration import Duration

ParameterGroups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerKind:
    """See `register_optimizer`."""

    make: Callable[[ParameterGroups, "OptimizerConfig", Any], torch.optim.Optimizer]
    room: Callable[[Tensor], dict[str, Tensor]]
    options: type | None
    group_numbers: tuple[str, ...]
    unused: tuple[str, ...]


OPTIMIZERS: dict[str, OptimizerKind] = {}
"""What `register_optimizer` was told, by name."""


def register_optimizer(
    name: str,
    *,
    make: Callable[[ParameterGroups, "OptimizerConfig", Any], torch.optim.Optimizer],
    room: Callable[[Tensor], dict[str, Tensor]],
    options: type | None = None,
    group_numbers: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> None:
    """Makes `optimizer.name=<name>` mean what `make` returns.

    make: (parameter groups, the recipe's `optimizer` group, options) -> torch's optimizer over the fp32 masters. The engine sets `lr` and
        `weight_decay` of its groups before each step, and has clipped the gradients.
    room: a master -> the state that optimizer keeps for it in `optimizer.state`, by name, as it makes it at its first step: tensors of the
        master's shape, or 0-dim for numbers. Checkpoints store it under these names.
    options: a dataclass of keys of its own, which become the group `optimizer.<name>`; `make` gets an instance, or None.
    group_numbers: keys of its parameter groups in which it counts (`step`), stored too.
    unused: keys of the `optimizer` group that it has no use for, and which a recipe therefore must leave as they are.
    Raises ValueError for a name that is taken, by another optimizer or by a key of the group.
    """
    if name in OPTIMIZERS or name in OptimizerConfig.__dataclass_fields__:
        raise ValueError(f"optimizer.name={name} is taken: choose another name")
    OPTIMIZERS[name] = OptimizerKind(make, room, options, group_numbers, unused)


def optimizer_options() -> dict[str, type]:
    """The dataclass of each registered optimizer that has keys of its own."""
    return {name: kind.options for name, kind in OPTIMIZERS.items() if kind.options is not None}


@dataclass(frozen=True)
class OptimizerConfig:
    """The recipe's `optimizer` group: which optimizer, and a warm-up, stable, decay schedule."""

    learning_rate: float
    """of the stable phase"""
    name: str = "adamw"
    """adamw, lion, or a registered one"""
    min_learning_rate: float = 0.0
    """at the end of the decay"""
    warmup: Duration = Duration(0, "steps")
    """of the linear rise from 0"""
    decay: Duration = Duration(0, "steps")
    """of the fall at the end of the run"""
    decay_style: Literal["minus_sqrt", "linear", "cosine"] = "minus_sqrt"
    """shape of the fall"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay of the running means of gradients and of their squares (adamw), or of the update and of the momentum (lion)"""
    eps: float = 1e-8
    """added to the root of the second moment (adamw)"""
    weight_decay: float = 0.1
    """times the learning rate, of tensors of more than one dimension"""
    clip: float = 1.0
    """largest norm of the whole gradient"""
    options: dict[str, Any] = field(default_factory=dict, metadata={"kinds": optimizer_options, "flat": False})
    """keys of one optimizer alone, in a group of its name"""


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises ValueError, in one sentence, for an optimizer there is not, and for keys that the chosen one would ignore."""
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name={config.name!r} is not available: use one of {', '.join(OPTIMIZERS)}")
    fields = OptimizerConfig.__dataclass_fields__
    for key in OPTIMIZERS[config.name].unused:
        if getattr(config, key) != fields[key].default:
            raise ValueError(
                f"optimizer.{key}={getattr(config, key)} has no meaning for optimizer.name={config.name}: leave it at {fields[key].default}"
            )
    for name, options in config.options.items():
        if name != config.name and options != type(options)():
            raise ValueError(
                f"optimizer.{name} is set, but optimizer.name={config.name}: use optimizer.name={name}, or leave its keys alone"
            )


def open_optimizer(config: OptimizerConfig) -> Optimizer:
    """The recipe's optimizer, for an engine."""
    kind = OPTIMIZERS[config.name]
    options = config.options.get(config.name)
    return Optimizer(lambda groups: kind.make(groups, config, options), kind.room, kind.group_numbers, config.weight_decay, config.clip)


# -- the optimizers ------------------------------------------------------------------------------------------------------------------------


def _adamw(groups: ParameterGroups, config: OptimizerConfig, options: None) -> torch.optim.Optimizer:
    on_gpu = any(param.is_cuda for group in groups for param in group["params"])
    # Fused: one kernel instead of temporaries as large as the masters. On a CPU it rounds otherwise than the plain loop, which stays.
    return torch.optim.AdamW(groups, config.learning_rate, config.betas, config.eps, config.weight_decay, fused=on_gpu or None)


def _adamw_room(master: Tensor) -> dict[str, Tensor]:
    # A fused AdamW counts beside its parameters; on a CPU that is the same place.
    step = torch.zeros((), dtype=torch.float32, device=master.device)
    return {"step": step, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}


@dataclass(frozen=True)
class LionOptions:
    fixed_decay: bool = False
    """weight decay is not multiplied by the learning rate"""


def _lion(groups: ParameterGroups, config: OptimizerConfig, options: LionOptions) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion  # imports a hundred optimizers: seconds that other runs need not wait

    return Lion(groups, config.learning_rate, config.betas, config.weight_decay, fixed_decay=options.fixed_decay)


register_optimizer("adamw", make=_adamw, room=_adamw_room)
# Chen et al. 2023, arXiv:2302.06675: the sign of an interpolation of momentum and gradient; one moment instead of two.
register_optimizer(
    "lion",
    make=_lion,
    room=lambda master: {"exp_avg": torch.zeros_like(master)},
    options=LionOptions,
    group_numbers=("step",),
    unused=("eps",),
)


# -- the schedule --------------------------------------------------------------------------------------------------------------------------


def learning_rate(config: OptimizerConfig, step: int, total_steps: int, tokens_per_step: int) -> float:
    """Of optimizer step `step` (from 0) of `total_steps`.

    Warm-up rises linearly and reaches the peak on its last step; the decay falls from the peak and reaches the minimum with the last step of
    the run. minus_sqrt: 1 - sqrt(fraction of the decay done).
    """
    warmup, decay = config.warmup.steps(tokens_per_step, total_steps), config.decay.steps(tokens_per_step, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = step + 1 - (total_steps - decay)
    if decay == 0 or done <= 0:
        return config.learning_rate
    fraction = min(done / decay, 1.0)
    left = {
        "minus_sqrt": 1 - math.sqrt(fraction),
        "linear": 1 - fraction,
        "cosine": (1 + math.cos(math.pi * fraction)) / 2,
    }[config.decay_style]
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * left
