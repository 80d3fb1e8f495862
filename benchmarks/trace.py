"""A step of one rank on a GPU that is not there: what it launches, moves, keeps and waits for, by kind of layer.

    python -m benchmarks.trace -cn nemotron3_super world=64

The rank's own step runs, schedule, model, multi-token prediction and optimizer, on a pretended CUDA device (`benchmarks.pretended_cuda`) in
a process group that sends nothing; a tensor on a wrong device raises. world: ranks; default the fewest the layout fits. rank: from 0, default
0. Everything else as for `python -m train`; the hardware is that of `cluster`, an H100 where none is named. A step is cut down to the fewest
microbatches its schedule takes, and text is made up. It needs a C++ compiler once, and the triton package.

Columns: `benchmarks.ledger`. Times are rooflines, good for ratios: nothing is measured, collectives count as passes over memory.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.ledger import Account, Ledger
from benchmarks.pretended_cuda import DEVICE
from benchmarks.timing import table
from data.batch import Batch
from data.text_data import TextData
from model.hybrid import HybridModel
from model.layer import Layer
from parallel import groups
from parallel.cluster import ClusterConfig
from parallel.layout import Layout
from train.build import Run, build
from train.inspection import split
from train.recipe.cli import main as with_recipe
from train.recipe.clusters import profiles
from train.recipe.tree import Recipe
from train.refusal import refuse
from train.timing import Stopwatch
from train.train_step import train_step

DEFAULT_HARDWARE = "h100"
DOCUMENTS = 6  # in a sequence, of uneven lengths, where documents are kept apart
OPTIMIZER, REST = "optimizer", "rest"


class MadeUp(TextData):
    """Batches of ones, in documents of uneven lengths."""

    def __init__(self, recipe: Recipe) -> None:
        self.config, self.sequence_length = recipe.data, recipe.train.sequence_length

    def batch(self, samples: Sequence[int], step: int) -> Batch:
        shape = len(samples), self.sequence_length
        documents = torch.zeros(shape, dtype=torch.int32)
        if self.config.reset_at_document:
            for border in range(1, DOCUMENTS):
                documents[:, self.sequence_length * border**2 // DOCUMENTS**2 :] += 1
        ones = torch.ones(shape, dtype=torch.int64)
        return Batch(
            tokens=ones,
            labels=ones.clone(),
            loss_mask=torch.ones(shape, dtype=torch.bool),
            documents=documents,
            reset=self.config.reset_at_document,
            sample=torch.tensor(list(samples)),
            step=step,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. weights, gradients, optimizer: its own, between steps; peak: of all, during the step."""

    weights: int
    gradients: int
    optimizer: int
    peak: int


@dataclass(frozen=True)
class Trace:
    """One step. accounts: by kind of layer; waited: how often the host waited for which reason where."""

    layout: str
    hardware: str
    microbatches: int
    accounts: dict[str, Account]
    waited: dict[tuple[str, str], int]
    memory: Memory

    @property
    def total(self) -> Account:
        return sum(self.accounts.values(), Account())


class _Phases(Stopwatch):
    """Tells the ledger when the passes are over."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def mark(self, name: str) -> None:
        if name == "forward_backward":
            self._ledger.passes_over()
        self._ledger.turn_to(OPTIMIZER if name == "forward_backward" else REST)


def trace(recipe: Recipe, ranks: int, rank: int = 0) -> Trace:
    """One step of rank `rank` of `ranks`, in a process that pretends (`DEVICE.pretend`). Raises what a GPU would."""
    parallel, train = recipe.parallel, recipe.train
    microbatches = max(parallel.fewest_microbatches, parallel.pipeline)
    batch = microbatches * recipe.micro_batch_size * parallel.data(ranks)
    # The run is as long as before: formats depend on how far it is.
    recipe = replace(recipe, train=replace(train, global_batch_size=batch, steps=recipe.total_steps, tokens=None))
    hardware = recipe.cluster if recipe.cluster.name is not None else _default_hardware()
    ledger = Ledger(hardware)
    with groups.imagined(parallel, ranks, rank, torch.device("cuda", 0)) as layout, DEVICE.running(ledger, _rows(recipe, layout)):
        run = build(recipe, layout, MadeUp(recipe))
        run.engine.make_room(lambda param, name: 0.0)
        memory = _between_steps(run)
        for chunk in run.chunks:
            _label(chunk, ledger)
        ledger.accounts.clear()
        ledger.waited.clear()
        ledger.peak = ledger.living
        train_step(run, 0, _Phases(ledger))
        described = layout.describe()
        run.engine.close()
    return Trace(
        described, hardware.name or "", microbatches, dict(ledger.accounts), dict(ledger.waited), replace(memory, peak=ledger.peak)
    )


def _default_hardware() -> ClusterConfig:
    return next(profile for profile in profiles() if profile.name == DEFAULT_HARDWARE)


def _rows(recipe: Recipe, layout: Layout) -> int:
    """That this rank sends to experts, of one microbatch."""
    if not recipe.model.has_experts:
        return 1
    ranks = layout.context_size * (layout.tensor_size if layout.sequence_parallel else 1)
    top_k = next(mixer.engine(recipe.model.sizes(mixer.sizes))["top_k"] for mixer in recipe.model.used if mixer.has_experts)
    return recipe.train.sequence_length // ranks * recipe.micro_batch_size * top_k


def _between_steps(run: Run) -> Memory:
    params = [param for chunk in run.chunks for param in chunk.parameters()]
    states = [(state.master, *state.tensors.values()) for state in run.engine.parameter_states()]
    return Memory(
        weights=sum(param.numel() * param.element_size() for param in params),
        gradients=sum(4 * param.numel() for param in params),
        optimizer=sum(each.numel() * each.element_size() for tensors in states for each in tensors if each is not None),
        peak=0,
    )


def _label(chunk: HybridModel, ledger: Ledger) -> None:
    """Puts the chunk's pieces on accounts of their own."""
    pieces = {name: module for name, module in chunk.named_children() if name in ("embeddings", "norm_f")}
    for name, module in pieces.items():
        module.forward = ledger.labelled({"embeddings": "embedding", "norm_f": "final norm"}[name], module.forward)
    for layer in chunk.layers.values():
        assert isinstance(layer, Layer)
        layer.forward = ledger.labelled(layer.kind.name, layer.forward)  # type: ignore[method-assign]
    if chunk.is_last:
        for block in chunk.mtp:
            block.forward = ledger.labelled("MTP block", block.forward)
        chunk.head_loss = ledger.labelled("head and loss", chunk.head_loss)  # type: ignore[method-assign]


def report(trace: Trace, name: str) -> str:
    """For a person."""
    rows = [("", "times", "launches", "waits", "kept MiB", "moved GiB", "GEMM TFLOP", "ms", "of it GEMMs")]
    for kind, account in (*trace.accounts.items(), ("step", trace.total)):
        share = account.gemm_seconds / account.seconds if account.seconds else 0.0
        rows.append(
            (
                kind,
                str(account.calls) if kind != "step" and account.calls else "",
                f"{account.launches:,}",
                f"{account.waits:,}",
                f"{account.kept / 2**20:,.0f}",
                f"{account.moved / 2**30:,.1f}",
                f"{account.gemm_flops / 1e12:,.2f}",
                f"{account.seconds * 1e3:,.1f}",
                f"{share:.0%}",
            )
        )
    memory = trace.memory
    own = memory.weights + memory.gradients + memory.optimizer
    lines = [
        f"{name}, {trace.layout}, a step of {trace.microbatches} microbatch{'es' * (trace.microbatches > 1)}, as {trace.hardware} would have it",
        "",
        table(rows),
        "",
        f"peak memory {memory.peak / 2**30:.1f} GiB: weights {memory.weights / 2**30:.1f}, gradients {memory.gradients / 2**30:.1f}, "
        f"optimizer {memory.optimizer / 2**30:.1f}, activations and the rest {(memory.peak - own) / 2**30:.1f}",
    ]
    if trace.waited:
        lines += ["", "the host waits for the device"]
        ordered = sorted(trace.waited.items(), key=lambda item: -item[1])
        lines += [f"  {count:6}  {reason:24}  {where}" for (reason, where), count in ordered]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Prints it; returns the exit status."""
    try:
        world, rank, rest = split(arguments)
        DEVICE.pretend()
    except (ValueError, RuntimeError) as error:
        return refuse(str(error))

    def show(recipe: Recipe) -> int:
        ranks = world or recipe.parallel.fewest_ranks()
        if rank >= ranks:
            return refuse(f"rank={rank} is none of the {ranks} ranks: use rank={ranks - 1} or less")
        print(report(trace(recipe, ranks, rank), recipe.run.name))
        return 0

    return with_recipe(show, "benchmarks.trace", rest, ranks=world or "fewest")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
