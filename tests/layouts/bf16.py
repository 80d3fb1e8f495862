"""How far losses may lie apart that two layouts compute from the same weights with activations in bf16: a bound, from how rounding errors add up.

1. A number a stored in bf16 (8 significant bits) becomes a (1 + d) with |d| <= u = 2^-8. Sums inside GEMMs, of losses and of gradients are in
   fp32, whose 2^-24 is nothing beside it.
2. Of a loss L, a function of all numbers stored on the way, first order in u: L is off by the sum over them of (dL/da) a d. A backward pass
   gives dL/da beside a, so S = sqrt(sum of ((dL/da) a)^2) is computed, not guessed: over every bf16 tensor that any function or module
   returns, which counts some twice and none too little.
3. One rank rounds each number once, a layout at most three times: with parallel.tensor=2 a sum over features is two halves, each rounded to bf16,
   and their sum, again. The halves are as large as their sum or, of independent terms, smaller. So the two losses differ by a sum of four errors
   for every number, each within u |(dL/da) a|.
4. Those errors have no common sign. For independent ones of mean zero, Hoeffding's inequality bounds their sum by 6 u sqrt(4) S but for a
   probability of 2 exp(-6^2 / 2) = 3e-8 (the probabilistic analysis of Higham and Mary, SIAM J. Sci. Comput. 41, 2019; the worst case, all
   of one sign, would be sqrt(n) times as much, and does not happen).
5. The choice of experts is no smooth function: every token visits all of them here (model.top_k = model.experts), in all layouts alike.
6. Weights stay the same: with a learning rate of R, Adam moves none of N weights by more than R a step, which changes no bf16 weight for R = 1e-9.

    |L - L'| <= 12 * 2^-8 * S
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parallel import groups
from tests.layouts.cases import case
from tests.train.recipes import recipe
from train import loop
from train.step import to_microbatch
from train.train_step import train_step

ROUNDING = 2.0**-8
FACTOR = 12.0
STEPS = 3
RUN = (
    "precision=bf16",
    "precision.compute=bf16",
    "model.top_k=4",
    "optimizer.learning_rate=1e-9",
    "optimizer.min_learning_rate=0",
    "train.global_batch_size=4",
)
CASES = (case(2, tensor=2), case(2, expert=2), case(2, expert_tensor=2), case(2, pipeline=2), case(2, context=2), case(2))


class Sensitivity(TorchFunctionMode):
    """Sums ((dL/da) a)^2 over every bf16 tensor a that is returned while it is on, of which a backward pass then gives dL/da; see `of`."""

    def __init__(self) -> None:
        super().__init__()
        self.squares = 0.0
        self._seen: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.note(out)
        return out

    def note(self, out: Any) -> None:
        """out: a tensor, or several."""
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.dtype == torch.bfloat16 and not tensor.is_leaf:
                with torch._C.DisableTorchFunction():
                    value = tensor.detach().clone()
                    tensor.register_hook(lambda gradient, value=value: self._add(gradient, value))

    def _add(self, gradient: Tensor | None, value: Tensor) -> None:
        if gradient is None:  # this loss does not depend on it
            return
        with torch._C.DisableTorchFunction():
            self.squares += float((gradient.double() * value.double()).square().sum())


@contextmanager
def sensitive(model: nn.Module) -> Iterator[Sensitivity]:
    """Functions and modules of a forward pass are looked at."""
    with Sensitivity() as mode:
        handles = [module.register_forward_hook(lambda module, given, out: mode.note(out)) for module in model.modules()]
        try:
            yield mode
        finally:
            for handle in handles:
                handle.remove()


def bounds(rank: int, overrides: Sequence[str]) -> list[list[float]]:
    """Of each step, on one rank: how far the LM loss, and that of each MTP depth, may lie from another layout's."""
    made = loop.build(recipe(*overrides, world_size=1))
    (model,) = made.chunks
    found = []
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as a schedule does
    try:
        for step in range(STEPS):
            squares, counts = [0.0] * (1 + made.mtp_depths), torch.zeros(1 + made.mtp_depths, dtype=torch.int64)
            for samples in made.plan.samples(step):
                microbatch = to_microbatch(made.data.batch(samples, step), made.layout, 0.0, made.mtp_depths)
                counts += microbatch.loss_counts()
                for index in range(len(squares)):
                    with sensitive(model) as mode:
                        sums = model(microbatch)
                    sums[index].backward()
                    squares[index] += mode.squares
            found.append([FACTOR * ROUNDING * math.sqrt(square) / count for square, count in zip(squares, counts.tolist(), strict=True)])
        return found
    finally:
        groups.shutdown(leave_world=False)


def losses(rank: int, overrides: Sequence[str], world: int) -> list[list[float]]:
    """Of each step: the LM loss, and that of each MTP depth."""
    made = loop.build(recipe(*overrides, world_size=world))
    try:
        steps = [train_step(made, step) for step in range(STEPS)]
        return [[value for key, value in metrics.items() if key in ("loss/lm", "loss/mtp_1", "loss/mtp_2")] for metrics in steps]
    finally:
        groups.shutdown(leave_world=False)
