"""What long sequences cost: a Mamba layer by the length of the sequence, and the peak memory of a rank by parallel.context.

    python -m benchmarks.long_context                                      # the layer, 1k to 64k tokens; a step of 8k tokens on 1, 2 and 4 ranks
    python -m benchmarks.long_context rounds=5 ranks=[1,2,4,8] to=docs/long_context.json picture=docs/long_context.png

activations: bytes that a layer of `tiny` in fp32 saves for its backward pass, each piece of memory once, without parameters. time: CPU seconds of
its forward and backward pass on one thread, median of rounds in which the lengths take turns.
peak: the largest resident size of a rank in a training step of one sequence of `tokens`, above what it had before it, the most of all ranks.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from matplotlib import pyplot as plt

from benchmarks.arguments import main
from benchmarks.timing import keep_freed_memory, machine, save, table
from model.batch import Microbatch
from model.context import ModelContext
from model.layer import Layer
from parallel import groups
from parallel.layout import world_size
from train.build import build
from train.recipe.load import load_recipe
from train.report import drawing
from train.train_step import train_step


class LayerOfLength:
    """A Mamba layer and a sequence of random tokens."""

    def __init__(self, context: ModelContext, length: int):
        self.layer = Layer(context, "layers.0", "M")
        nothing = torch.zeros(1, length, dtype=torch.int64)
        self.microbatch = Microbatch.of(
            tokens=nothing,
            labels=nothing,
            loss_mask=nothing > 0,
            documents=nothing.int(),
            reset=False,
            sample=torch.zeros(1, dtype=torch.int64),
            step=0,
            depths=0,
        )
        self.x = torch.randn(length, 1, context.config.hidden_size, requires_grad=True)

    def saved_bytes(self) -> int:
        """For the backward pass, without parameters and the input."""
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.layer(self.x, self.microbatch)
        own = {parameter.untyped_storage().data_ptr() for parameter in (*self.layer.parameters(), self.x)}
        del y
        return sum(size for place, size in kept.items() if place not in own)

    def seconds(self) -> float:
        begin = time.process_time()
        self.layer(self.x, self.microbatch).sum().backward()
        return time.process_time() - begin


def by_length(lengths: list[int], rounds: int) -> tuple[dict[int, float], dict[int, float]]:
    """(bytes, seconds) per token of a layer by the length of the sequence."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    recipe = load_recipe("tiny", "precision=fp32")
    layout = groups.initialize(recipe.parallel, 0)
    try:
        context = ModelContext(recipe.model, layout, recipe.policy, 0, torch.float32, torch.device("cpu"))
        layers = {length: LayerOfLength(context, length) for length in lengths}
        kept = {length: layer.saved_bytes() / length for length, layer in layers.items()}
        seconds: dict[int, list[float]] = {length: [] for length in lengths}
        for index in range(rounds + 1):
            for length, layer in layers.items():
                # As many tokens of every length, so that all are measured as long.
                taken = sum(layer.seconds() for _ in range(max(lengths) // length)) / (max(lengths) // length * length)
                if index:
                    seconds[length].append(taken)
        return kept, {length: statistics.median(values) for length, values in seconds.items()}
    finally:
        groups.shutdown()
        torch.set_num_threads(threads)


def peak(tokens: int, way: str, to: str) -> None:
    """On every rank: a training step of one sequence over all of them; rank 0 writes the largest peak, in bytes, to a file.

    A short one goes before it, so that what a process loads with its first step does not count.
    """
    torch.set_num_threads(1)
    ranks, before = world_size(), 0
    for length in (64 * ranks, tokens):
        with tempfile.TemporaryDirectory() as directory:
            recipe = load_recipe(
                "tiny",
                "precision=fp32",
                "train.global_batch_size=1",
                f"train.sequence_length={length}",
                f"parallel.context={ranks}",
                f"parallel.context_mamba={way}",
                f"run.dir={directory}",
                world_size=ranks,
            )
            run = build(recipe)
            before = psutil.Process().memory_info().rss
            train_step(run, 0)
            if length == tokens:
                most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
                largest = torch.tensor(most - before)
                dist.all_reduce(largest, op=dist.ReduceOp.MAX)
                if run.layout.rank == 0:
                    Path(to).write_text(str(int(largest)))
            groups.shutdown(leave_world=length == tokens)


def by_ranks(ranks: list[int], tokens: int, way: str) -> dict[int, int]:
    """Peak bytes of a rank by the number of ranks, each number in processes of its own."""
    peaks = {}
    with tempfile.TemporaryDirectory() as directory:
        for count in ranks:
            to = f"{directory}/{count}"
            code = f"from benchmarks.long_context import peak; peak({tokens}, {way!r}, {to!r})"
            (script := Path(directory, "peak.py")).write_text(code)
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(script)]
            done = subprocess.run(launcher, capture_output=True, text=True, check=False)
            if done.returncode:
                told = [line for line in done.stderr.splitlines() if "Error: " in line]
                raise ValueError(f"ranks={count} tokens={tokens} did not run: {told[0] if told else done.stderr[-200:]}")
            peaks[count] = int(Path(to).read_text())
    return peaks


def draw(values: dict[str, Any], path: Path) -> None:
    with plt.rc_context(drawing.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
        for (name, label), colour in zip((("bytes", "activations"), ("seconds", "time")), drawing.RUN_COLOURS, strict=False):
            lengths, per_token = list(values[name]), list(values[name].values())
            relative = [value / per_token[0] for value in per_token]
            left.plot(lengths, relative, "o-", color=colour)
            left.annotate(label, (lengths[-1], relative[-1]), xytext=(6, 0), textcoords="offset points", color=colour, va="center")
        left.set_xscale("log", base=2)
        left.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
        left.set_ylim(0, 1.5)
        left.margins(x=0.16)
        left.set_title(f"A Mamba layer, per token, relative to {lengths[0]:,} tokens")
        left.set_xlabel("tokens of the sequence")
        peaks = values["peak_bytes"]
        first = next(iter(peaks.values()))
        bars = right.bar(
            [str(count) for count in peaks], [value / 2**20 for value in peaks.values()], color=drawing.RUN_COLOURS[0], width=0.6
        )
        less = [f"\n{first / value:.2f}x less" if value < first else "" for value in peaks.values()]
        right.bar_label(bars, [f"{value / 2**20:,.0f} MiB{text}" for value, text in zip(peaks.values(), less, strict=True)])
        right.set_ylim(0, 1.2 * max(peaks.values()) / 2**20)
        right.set_title(f"Peak of a rank, {values['tokens']:,} tokens")
        right.set_xlabel("parallel.context")
        drawing.save(figure, path)


def run(lengths: list[int], rounds: int, ranks: list[int], tokens: int, way: str, to: str, picture: str) -> None:
    if wrong := [count for count in ranks if tokens % count]:
        raise ValueError(f"tokens={tokens} is not a multiple of ranks={wrong[0]}: change one of them")
    if way not in ("state", "all_to_all"):
        raise ValueError(f"way={way} is unknown: use state or all_to_all")
    kept, seconds = by_length(lengths, rounds)
    print(f"A Mamba layer of tiny in fp32, {machine(torch.device('cpu'))}; medians of {rounds} rounds\n")
    rows = [("tokens", "saved / token", "relative", "CPU time / token", "relative")]
    for length in lengths:
        relative = kept[length] / kept[lengths[0]], seconds[length] / seconds[lengths[0]]
        rows.append(
            (f"{length:,}", f"{kept[length]:,.0f} B", f"{relative[0]:.3f}", f"{seconds[length] * 1e6:.2f} us", f"{relative[1]:.3f}")
        )
    print(table(rows), flush=True)
    peaks = by_ranks(ranks, tokens, way)
    print(f"\nPeak memory of a rank in a step of tiny in fp32, one sequence of {tokens:,} tokens, parallel.context_mamba={way}\n")
    first = peaks[ranks[0]]
    print(
        table(
            [
                ("parallel.context", "peak", "less"),
                *((str(count), f"{size / 2**20:,.0f} MiB", f"{first / size:.2f}x") for count, size in peaks.items()),
            ]
        )
    )
    values = {"machine": machine(torch.device("cpu")), "bytes": kept, "seconds": seconds, "tokens": tokens, "way": way, "peak_bytes": peaks}
    save(to, values)
    if picture:
        draw(values, Path(picture))


DEFAULTS = {
    "lengths": [1024, 4096, 16384, 65536],
    "rounds": 3,
    "ranks": [1, 2, 4],
    "tokens": 8192,
    "way": "state",
    "to": "",
    "picture": "",
}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
