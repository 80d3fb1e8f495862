"""An optimizer of PyTorch's own: SGD with momentum, with an option of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.optimizer import OptimizerConfig, ParameterGroups, register_optimizer


@dataclass(frozen=True)
class SGDOptions:
    momentum: float = 0.9
    """Decay of the running sum of gradients."""


def make(groups: ParameterGroups, config: OptimizerConfig, options: SGDOptions) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, config.learning_rate, momentum=options.momentum, weight_decay=config.weight_decay)


def room(master: Tensor) -> dict[str, Tensor]:
    return {"momentum_buffer": torch.zeros_like(master)}


def register() -> None:
    register_optimizer("sgd", make=make, room=room, options=SGDOptions, unused=("betas", "eps"))
