"""Which module was the first whose numbers were not finite: the step again, on the same samples, with hooks on every module.

Random bits depend on the seed and on global indices alone, so the step computes what it computed before; what does not come back was a fault of
the machine, not of the numbers. Nothing is updated. Each rank notes its first value that is not finite: in the forward pass an output, in the
backward pass the gradient with respect to a module's input, or that of a weight before ranks reduce it (an expert's by its own name). The
first of all ranks is the one of the earliest microbatch, forward before backward, along the pipeline, and within a stage in the order in which its
ranks, which all run the same modules, come by.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.hybrid import HybridModel, end_step
from model.linear import Linear
from model.moe import Experts
from model.precision.gemm import GEMMS
from parallel.shards import pieces_of
from train.build import Run
from train.checkpoint.ranks import exchange
from train.step import LossStep, sum_over_ranks, to_microbatch


@dataclass(frozen=True)
class Finding:
    """The first value of a rank that was not finite. phase: weights (before the step), forward, backward or loss; what: output, gradient of the
    input, or a tensor's name; formats: of the module's GEMMs, by GEMM; empty where it has none."""

    phase: str
    module: str
    what: str
    rank: int
    microbatch: int
    samples: tuple[int, ...]
    formats: dict[str, str]
    order: tuple[int, ...]

    def sentence(self) -> str:
        """For a person."""
        formats = f", in {', '.join(f'{gemm} {form}' for gemm, form in self.formats.items())}" if self.formats else ""
        if self.phase == "weights":
            return f"the weight {self.what} itself is not finite (rank {self.rank})"
        where = (
            f"rank {self.rank}, microbatch {self.microbatch}, samples {min(self.samples)} to {max(self.samples)}" if self.samples else ""
        )
        if self.phase == "loss":
            return f"the loss itself, behind finite outputs of every module ({where})"
        return f"{self.module}: {self.what} in the {self.phase} pass ({where}{formats})"

    def plain(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "order"}


class _Watch:
    """The hooks of one rank, and what they saw first."""

    def __init__(self, run: Run, step: int, samples: Sequence[Sequence[int]]) -> None:
        self.run, self.step, self.samples = run, step, samples
        self.forwards = -1  # of the chunk that is called now
        self._calls: Counter[nn.Module] = Counter()
        self.looks: Counter[tuple[str, int]] = Counter()  # by phase and microbatch
        self.found: Finding | None = None

    def looking(self, phase: str, microbatch: int) -> bool:
        """Counts a place that is come by; whether nothing was found yet."""
        self.looks[phase, microbatch] += 1
        return self.found is None

    def note(self, phase: str, module: str, what: str, microbatch: int, formats: dict[str, str]) -> None:
        if self.found is None:
            layout = self.run.layout
            stage = layout.pipeline_rank if phase == "forward" else -layout.pipeline_rank
            place = ("weights", "forward", "loss", "backward").index(phase)
            samples = tuple(self.samples[microbatch]) if phase != "weights" else ()
            order = (microbatch, place, stage, self.looks[phase, microbatch], layout.rank)
            self.found = Finding(phase, module, what, layout.rank, microbatch, samples, formats, order)

    def formats(self, module: nn.Module) -> dict[str, str]:
        if not isinstance(module, Linear | Experts):
            return {}
        policy, names = self.run.context.policy, [site.name for site, _ in module.weights()]
        chosen = {
            gemm: form for name in names for gemm, form in zip(GEMMS, policy.formats(name, self.run.progress(self.step)), strict=True)
        }
        return {gemm: policy.label(form) for gemm, form in chosen.items()}

    def hooks(self) -> Iterator[Any]:
        for chunk in self.run.chunks:
            yield chunk.register_forward_pre_hook(self._begins)
            yield chunk.register_forward_hook(self._after("", chunk))
            owners = {id(weight): module for module in chunk.modules() for weight in module.parameters(recurse=False)}
            for name, module in chunk.named_modules():
                if name:
                    yield module.register_forward_pre_hook(self._before(name, module))
                    yield module.register_forward_hook(self._after(name, module))
            for name, weight in chunk.named_parameters():
                yield weight.register_hook(self._of_weight(name, weight, owners[id(weight)]))

    def _begins(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.forwards = self._calls[module]
        self._calls[module] += 1

    def _before(self, name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            microbatch = self.forwards

            def check(gradient: Tensor) -> None:
                if self.looking("backward", microbatch) and not gradient.isfinite().all():
                    self.note("backward", name, "the gradient with respect to its input", microbatch, self.formats(module))

            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(check)

        return hook

    def _after(self, name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            phase, what = ("forward", "its output") if name else ("loss", "the summed loss")
            for value in output if isinstance(output, tuple) else (output,):
                wanted = isinstance(value, Tensor) and value.is_floating_point()
                if wanted and self.looking(phase, self.forwards) and not value.isfinite().all():
                    self.note(phase, name or "loss", what, self.forwards, self.formats(module))

        return hook

    def _of_weight(self, name: str, weight: nn.Parameter, owner: nn.Module) -> Any:
        times = iter(range(len(self.samples)))

        def hook(gradient: Tensor) -> None:
            microbatch = next(times, len(self.samples) - 1)
            held = getattr(weight, "main_grad", None)  # Megatron's, where fused linear layers put theirs
            for value in (gradient, held):
                if self.looking("backward", microbatch) and value is not None and not value.isfinite().all():
                    what = f"the gradient of {_stored_name(weight, value.view(weight.shape)) or name}"
                    self.note("backward", name.rpartition(".")[0] or name, what, microbatch, self.formats(owner))

        return hook


def _stored_name(weight: Tensor, values: Tensor) -> str | None:
    """The tensor on disk, one of several a parameter may hold, in which the first value that is not finite lies."""
    return next((piece.name for piece in pieces_of(weight) if not values[piece.local].isfinite().all()), None)


@contextmanager
def _attached(watch: _Watch) -> Iterator[None]:
    handles: list[Any] = []
    try:
        handles.extend(watch.hooks())
        yield
    finally:
        for handle in handles:
            handle.remove()


def diagnose(run: Run, step: int) -> Finding | None:
    """Repeats the forward and backward pass of step `step` (from 0); what was first not finite on any rank, the same on every rank; None where
    everything is finite this time. Collective. Weights, optimizer state and buffers stay what they are."""
    recipe, layout = run.recipe, run.layout
    progress, depths, parts = step / recipe.total_steps, recipe.model.mtp_depths, run.plan.samples(step)
    watch = _Watch(run, step, parts)
    run.engine.settle()
    _weights(watch, run.chunks)
    microbatches = [to_microbatch(run.data.batch(part, step), layout, progress, depths) for part in parts]
    counts = sum_over_ranks(torch.stack([m.loss_counts() for m in microbatches]).sum(0), layout, pipeline=False)
    losses = LossStep(layout, counts, recipe.model.mtp_loss_scale)
    with _attached(watch):
        run.engine.train_step(
            losses,
            microbatches,
            sequence_length=recipe.train.sequence_length,
            micro_batch_size=recipe.micro_batch_size,
            learning_rate=0.0,
            agreed=lambda: False,
        )
    end_step(run.chunks, update=False)
    found = [finding for finding in exchange(watch.found) if finding is not None]
    return min(found, key=lambda finding: finding.order, default=None)


def _weights(watch: _Watch, chunks: Sequence[HybridModel]) -> None:
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if not weight.isfinite().all():
                watch.note("weights", name.rpartition(".")[0], _stored_name(weight, weight) or name, 0, {})


def everything_finite(run: Run) -> bool:
    """Whether all weights, buffers, masters and optimizer state of all ranks are: what makes a checkpoint a good one. Collective."""
    run.engine.settle()
    mine = all(
        bool(tensor.isfinite().all())
        for chunk in run.chunks
        for tensor in (*chunk.parameters(), *chunk.buffers())
        if tensor.is_floating_point()
    ) and all(
        bool(tensor.isfinite().all())
        for state in run.engine.parameter_states()
        for tensor in (*(() if state.master is None else (state.master,)), *state.tensors.values())
    )
    return all(exchange(mine))
