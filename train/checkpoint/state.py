"""What a run is, as parts: weights, buffers, fp32 masters and whatever the optimizer keeps.

Everything is stored under the name of the model parameter it belongs to, cut like that parameter, so that any layout
resumes from any other and optimizer state needs no conversion:

    model/<name>     weights and persistent buffers, in their own dtype
    master/<name>    fp32 masters, only of weights that are not fp32 themselves
    <state>/<name>   a tensor the optimizer keeps for each parameter, such as AdamW's exp_avg and exp_avg_sq; absent before its first step
    <state>          a number it keeps (int64, or float64 where it is not whole), if it is the same for all parameters, such as AdamW's
                     step; else <state>/<name>
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from parallel.engine import ParameterState, Stateful
from parallel.shards import pieces_of
from train.checkpoint.boxes import Box
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.parts import Part, parts_of
from train.checkpoint.ranks import exchange
from train.checkpoint.reader import Checkpoint

MODEL, MASTER = "model", "master"


def model_parts(chunks: Sequence[nn.Module]) -> Iterator[Part]:
    """Weights and persistent buffers of this rank."""
    for chunk in chunks:
        persistent = chunk.state_dict(keep_vars=True)
        for name, tensor in persistent.items():
            pieces = pieces_of(tensor)
            if not pieces:
                raise CheckpointError(f"{name} has no pieces, so its name on disk is unknown")
            yield from parts_of(MODEL, pieces, tensor.shape, tensor.detach())


def optimizer_parts(states: Iterable[ParameterState]) -> Iterator[Part]:
    """Masters and tensors of the optimizer on this rank."""
    for state in states:
        pieces, shape = pieces_of(state.param), state.param.shape
        held = state.tensors if state.master is None else {MASTER: state.master, **state.tensors}
        for name, tensor in held.items():
            yield from parts_of(name, pieces, shape, tensor, state.flat_range)


def number_parts(states: Sequence[ParameterState]) -> Iterator[Part]:
    """The numbers the optimizer keeps; collective, because one that is the same for all parameters of all ranks is stored once."""
    mine: dict[str, set[float]] = {}
    for state in states:
        for name, value in state.numbers.items():
            mine.setdefault(name, set()).add(value)
    values: dict[str, set[float]] = {}
    for held in exchange(mine):
        for name, some in held.items():
            values.setdefault(name, set()).update(some)
    scalar = Box((), ())
    yield from (Part(name, (), scalar, _number(*some)) for name, some in values.items() if len(some) == 1)
    for state in states:
        for name, value in state.numbers.items():
            if len(values[name]) > 1:
                yield from (Part(f"{name}/{piece.name}", (), scalar, _number(value)) for piece in pieces_of(state.param))


def state_of_frozen(checkpoint: Checkpoint, chunks: Sequence[nn.Module]) -> set[str]:
    """Names of the masters and the optimizer's tensors that a checkpoint holds of parameters which are not trained here: nobody needs them."""
    frozen = {piece.name for chunk in chunks for param in chunk.parameters() if not param.requires_grad for piece in pieces_of(param)}
    split = ((name, *name.split("/", 1)) for name in checkpoint.manifest.tensors if "/" in name)
    return {name for name, kind, param in split if kind != MODEL and param in frozen}


def _number(value: float) -> Tensor:
    whole = float(value).is_integer() and abs(value) < 2**53
    return torch.tensor(value, dtype=torch.int64 if whole else torch.float64)


class StoredNumbers:
    """The numbers of an optimizer in a checkpoint: what `Stateful.make_room` asks for. used: names of the tensors that held them."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._read: dict[str, float] = {}

    @property
    def used(self) -> set[str]:
        return set(self._read)

    def __call__(self, param: nn.Parameter, name: str) -> float:
        """Raises CheckpointError where it is not stored, or differs between what is one parameter here."""
        if name in self._checkpoint.manifest.tensors:
            return self._value(name)
        pieces = [f"{name}/{piece.name}" for piece in pieces_of(param)]
        values = {self._value(piece) for piece in pieces if piece in self._checkpoint.manifest.tensors}
        if len(values) > 1:
            raise CheckpointError(f"{name} of {pieces[0]} and {pieces[-1]} differs, but they are one parameter in this run")
        return values.pop() if values else self._value(name)

    def _value(self, name: str) -> float:
        if name not in self._read:
            self._read[name] = self._checkpoint.read_full(name).item()
        return self._read[name]


def make_room(checkpoint: Checkpoint, engine: Stateful) -> set[str]:
    """Lets the optimizer make room for the state the checkpoint holds, if it holds any, with its numbers in place; returns their names."""
    kept = {name.split("/", 1)[0] for name in checkpoint.manifest.tensors} - {MODEL, MASTER}
    numbers = StoredNumbers(checkpoint)
    if kept:
        engine.make_room(numbers)
    return numbers.used
