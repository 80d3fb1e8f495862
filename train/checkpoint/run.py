"""Saving and restoring a whole run: weights, buffers, fp32 masters, Adam's moments and step, and the loop's own state.

Everything is stored under the name of the model parameter it belongs to, cut like that parameter, so that any layout
resumes from any other and optimizer state needs no conversion:

    model/<name>        weights and persistent buffers, in their own dtype
    master/<name>       fp32 masters, only of weights that are not fp32 themselves
    exp_avg/<name>      Adam's first and second moments, fp32; absent before the first optimizer step
    exp_avg_sq/<name>
    step                optimizer steps Adam has counted, one int64 for all parameters
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.shards import pieces_of
from train.checkpoint.boxes import Box
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.parts import Part, parts_of
from train.checkpoint.ranks import together
from train.checkpoint.reader import Checkpoint, latest
from train.checkpoint.writer import GIBIBYTE, save

CHECKPOINTS = "checkpoints"
STEP = "step"


class ParameterState(Protocol):
    """What the optimizer on this rank keeps for one model parameter (see parallel.engine).

    master, exp_avg, exp_avg_sq: fp32, of the parameter's shape; with a flat_range (start, stop), 1-D: elements start
    ... stop - 1 of the flattened parameter. master is None where the weight itself is fp32.
    """

    param: nn.Parameter
    master: Tensor | None
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    step: int | None
    flat_range: tuple[int, int] | None


class TrainingEngine(Protocol):
    def parameter_states(self) -> Iterable[ParameterState]: ...

    def load_step(self, step: int) -> None: ...


def save_run(
    run_dir: Path | str,
    engine: TrainingEngine,
    model: nn.Module | Sequence[nn.Module],
    step: int,
    state: Mapping[str, Any],
    *,
    tokens: int = 0,
    keep: int | None = None,
    shard_bytes: int = GIBIBYTE,
) -> Path:
    """Writes `run_dir/checkpoints/step-<step>` and returns its path. Called by every rank, between two steps.

    model: this rank's model chunks. Other arguments and errors: see `train.checkpoint.writer.save`.
    """
    directory = Path(run_dir) / CHECKPOINTS

    parts: list[Part] = []

    def collect() -> set[int]:
        states = list(engine.parameter_states())
        parts.extend(_model_parts(model))
        parts.extend(_optimizer_parts(states))
        if any(s.exp_avg is not None and s.step is None for s in states):
            raise CheckpointError("the optimizer has moments but does not say how many steps it has counted")
        return {int(s.step) for s in states if s.step is not None}

    doing = f"cannot write a checkpoint of step {step} in {directory}"
    counts = sorted(set().union(*together(collect, doing)))
    if len(counts) > 1:
        raise CheckpointError(f"{doing}: Adam has counted {counts[0]} steps for some parameters and {counts[-1]} for others")
    parts += [Part(STEP, (), Box((), ()), torch.tensor(count)) for count in counts]
    return save(directory, step, parts, state, tokens=tokens, keep=keep, shard_bytes=shard_bytes)


def restore_run(
    run_dir: Path | str,
    engine: TrainingEngine,
    model: nn.Module | Sequence[nn.Module],
    *,
    verify: bool = True,
    report: Callable[[str], None] = print,
) -> Checkpoint | None:
    """Fills model and optimizer from the newest valid checkpoint of a run, bit for bit; None if there is none.

    The result knows `.step`, `.tokens` and the loop's `.state`. verify: compare checksums first.
    Raises CheckpointError, on every rank, if checkpoint and run do not hold the same tensors.
    """
    checkpoint = latest(Path(run_dir) / CHECKPOINTS, verify=verify, report=report)
    if checkpoint is not None:
        restore(checkpoint, engine, model)
    return checkpoint


def restore(checkpoint: Checkpoint, engine: TrainingEngine, model: nn.Module | Sequence[nn.Module]) -> None:
    """Fills model and optimizer from this checkpoint (see `restore_run`)."""
    doing = f"cannot resume from {checkpoint.path}"

    parts: list[Part] = []

    def collect() -> set[str]:
        names = set()
        if STEP in checkpoint.manifest.tensors:
            # Adam allocates its moments at its first step; the engine makes room for them when told the count.
            engine.load_step(int(checkpoint.read_full(STEP)))
            names.add(STEP)
        parts.extend(_model_parts(model))
        parts.extend(_optimizer_parts(engine.parameter_states()))
        return names.union(part.name for part in parts)

    names = together(collect, doing)
    _refuse_surplus(checkpoint.manifest.tensors.keys() - set().union(*names), doing)
    together(lambda: checkpoint.load_into(parts), doing)


def load_weights(checkpoint: Checkpoint, model: nn.Module | Sequence[nn.Module]) -> None:
    """Fills the model's weights and buffers alone, for evaluation and generation. Raises CheckpointError where it holds others, too."""
    doing = f"cannot load the weights of {checkpoint.path}"
    parts: list[Part] = []

    def collect() -> set[str]:
        parts.extend(_model_parts(model))
        return {part.name for part in parts}

    stored = {name for name in checkpoint.manifest.tensors if name.startswith("model/")}
    _refuse_surplus(stored - set().union(*together(collect, doing)), doing)
    together(lambda: checkpoint.load_into(parts), doing)


def _refuse_surplus(names: set[str], doing: str) -> None:
    if names:
        others = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        raise CheckpointError(f"{doing}: it holds {min(names)}{others}, which this run does not have")


def _model_parts(model: nn.Module | Sequence[nn.Module]) -> Iterator[Part]:
    """Weights and persistent buffers of this rank."""
    for chunk in [model] if isinstance(model, nn.Module) else model:
        for path, module in chunk.named_modules():
            buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
            for name, tensor in (*module._parameters.items(), *buffers.items()):
                if tensor is None:
                    continue
                pieces = pieces_of(tensor)
                if not pieces:
                    raise CheckpointError(f"{path}.{name} has no pieces, so its name on disk is unknown")
                yield from parts_of("model", pieces, tensor.shape, tensor.detach())


def _optimizer_parts(states: Iterable[ParameterState]) -> Iterator[Part]:
    for state in states:
        pieces, shape = pieces_of(state.param), state.param.shape
        for kind, tensor in (("master", state.master), ("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            if tensor is not None:
                yield from parts_of(kind, pieces, shape, tensor.detach(), state.flat_range)
