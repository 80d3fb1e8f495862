"""The learning rate as a pure function of the step: warm-up, constant, decay (WSD)."""

import math
from dataclasses import dataclass
from typing import Literal

from train.duration import Duration


@dataclass(frozen=True)
class OptimizerConfig:
    """The recipe's `optimizer` group: AdamW with a warm-up, stable, decay schedule."""

    learning_rate: float
    min_learning_rate: float = 0.0
    warmup: Duration = Duration(0, "steps")
    decay: Duration = Duration(0, "steps")
    decay_style: Literal["minus_sqrt", "linear", "cosine"] = "minus_sqrt"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


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
