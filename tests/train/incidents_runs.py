"""Runs into which a fault is put, for the tests of `train.incidents`; also run by ranks of the pool."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.moe import Experts
from parallel import groups
from tests.train.recipes import recipe
from train import loop
from train.build import Run, build

GIVEN = ("precision=fp32", "monitor.quantization.every=0", "optimizer.warmup=1", "optimizer.decay=1")

Fault = Callable[[Run], None]


def run(run_dir: Path, *overrides: str, fault: Fault | None = None, world_size: int = 1) -> int:
    """Trains through `loop.run`; fault: is put into the built run."""
    real = loop.build

    def faulty(*arguments: Any, **more: Any) -> Run:
        made = build(*arguments, **more)
        if fault is not None:
            fault(made)
        return made

    loop.build = faulty  # type: ignore[assignment]
    try:
        return loop.run(recipe(*GIVEN, f"run.dir={run_dir}", *overrides, world_size=world_size))
    finally:
        loop.build = real
        groups.shutdown(leave_world=False)


def _watch_samples(made: Run) -> dict[str, set[int]]:
    """Which samples the forward pass under way is of."""
    now: dict[str, set[int]] = {"samples": set()}

    def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        now["samples"] = set(inputs[0].sample.tolist())

    made.chunks[0].register_forward_pre_hook(remember)
    return now


def nan_in_an_experts_gradient(samples: Sequence[int], expert: int = 1) -> Fault:
    """The gradient of the up projection of expert `expert` of the first MoE layer is NaN whenever one of these samples is in the microbatch: on the
    ranks that hold that expert alone, and with several data-parallel ones on the one that has the sample."""

    def fault(made: Run) -> None:
        now = _watch_samples(made)
        experts = next(module for module in made.chunks[0].modules() if isinstance(module, Experts))
        if not experts.first <= expert < experts.first + experts.local:
            return

        def spoil(gradient: Tensor) -> None:
            if now["samples"] & set(samples):
                experts.up_proj.main_grad[expert - experts.first, 0, 0] = torch.nan  # type: ignore[attr-defined]

        experts.up_proj.register_hook(spoil)

    return fault


def nan_in_an_output(samples: Sequence[int], module: str, rank: int) -> Fault:
    """What this module gives on this rank begins with a NaN whenever one of these samples is in the microbatch; not in evaluations."""

    def fault(made: Run) -> None:
        now = _watch_samples(made)
        if made.layout.rank != rank:
            return
        owner = made.chunks[0].get_submodule(module)

        def spoil(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not (owner.training and now["samples"] & set(samples)):
                return None
            first, *rest = output if isinstance(output, tuple) else (output,)
            mask = torch.zeros_like(first)
            mask.view(-1)[0] = torch.nan
            return (first + mask, *rest) if isinstance(output, tuple) else first + mask

        owner.register_forward_hook(spoil)

    return fault


def exploding_loss(samples: Sequence[int], factor: float) -> Fault:
    """The losses of microbatches with one of these samples are `factor` times what they are; NaN for a factor of NaN."""

    def fault(made: Run) -> None:
        now = _watch_samples(made)

        def scale(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return output * factor if module.training and now["samples"] & set(samples) else None

        made.chunks[0].register_forward_hook(scale)

    return fault


def skipping(ranges: Sequence[tuple[int, int]]) -> Fault:
    """No fault: a run that is told from its start which samples it never sees."""

    def fault(made: Run) -> None:
        made.plan = made.plan.skipping(ranges)

    return fault


def flip_a_bit(rank: int, name: str, after: int) -> Fault:
    """Flips the lowest bit of one weight on one rank, once `after` steps are done; of fp32 weights, which are their own masters."""

    def fault(made: Run) -> None:
        done = [0]
        if made.layout.rank != rank:
            return
        weight = made.chunks[0].get_parameter(name)
        real = made.engine.train_step

        def step(*arguments: Any, **more: Any) -> Any:
            result = real(*arguments, **more)
            done[0] += 1
            if done[0] == after:
                with torch.no_grad():
                    weight.view(-1).view(torch.int32)[7] ^= 1
            return result

        made.engine.train_step = step  # type: ignore[method-assign]

    return fault


def on_ranks(rank: int, run_dir: Path, world_size: int, overrides: tuple[str, ...], fault: str, arguments: tuple[Any, ...]) -> int:
    """`run` on a rank of the pool; fault: the name of one of the above."""
    made = None if not fault else globals()[fault](*arguments)
    return run(run_dir, *overrides, fault=made, world_size=world_size)
