"""The front of this room: saving and restoring a whole run, its directory kept in order.

    checkpointer = Checkpointer(run_dir, engine, chunks)
    checkpoint = checkpointer.load_newest()              # model and optimizer filled, or None: a new run
    checkpointer.save(step, state, tokens=...)           # between two steps
    checkpointer.close()

Called by every rank. `save` is complete when it returns; a caller still lets `maybe_wait` go before it changes weights, and `close` at the
end, so that one which copies first and writes later is a change of this file alone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from parallel.engine import Stateful
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.parts import Part
from train.checkpoint.ranks import rank_and_size, together
from train.checkpoint.reader import Checkpoint, finished, latest
from train.checkpoint.state import MODEL, make_room, model_parts, number_parts, optimizer_parts
from train.checkpoint.writer import GIBIBYTE, clear_leftovers, save

CHECKPOINTS = "checkpoints"


class Checkpointer:
    """Checkpoints of the run in `run_dir`, in `run_dir/checkpoints`.

    chunks: this rank's model chunks. keep: how many checkpoints remain after each save, None: all. shard_bytes: size limit of a file. report:
    gets a line, on rank 0, for each checkpoint that is passed over, with the reason.
    """

    def __init__(
        self,
        run_dir: Path | str,
        engine: Stateful,
        chunks: Sequence[nn.Module],
        *,
        keep: int | None = None,
        shard_bytes: int = GIBIBYTE,
        report: Callable[[str], None] = print,
    ):
        self.directory = Path(run_dir) / CHECKPOINTS
        self._engine, self._chunks = engine, chunks
        self._keep, self._shard_bytes, self._report = keep, shard_bytes, report

    def save(self, step: int, state: Mapping[str, Any], *, tokens: int = 0) -> Path:
        """Writes the checkpoint of `step` and returns its path. state: the loop's own, JSON values only.

        Raises CheckpointError, on every rank, when any rank cannot write; older checkpoints are then as they were.
        """
        doing = f"cannot write a checkpoint of step {step} in {self.directory}"
        states = list(self._engine.parameter_states())
        parts: list[Part] = []
        together(lambda: parts.extend((*model_parts(self._chunks), *optimizer_parts(states))), doing)
        parts.extend(number_parts(states))
        return save(self.directory, step, parts, state, tokens=tokens, keep=self._keep, shard_bytes=self._shard_bytes)

    def load_newest(self, *, verify: bool = True) -> Checkpoint | None:
        """Fills model and optimizer from the newest valid checkpoint, bit for bit; None where none was ever finished.

        What a writer that was killed left behind is cleared away. verify: compare checksums first. The result knows `.step`, `.tokens` and the
        loop's `.state`. Raises CheckpointError, on every rank, if finished checkpoints are all damaged, or if checkpoint and run do not hold
        the same tensors.
        """
        clear_leftovers(self.directory)
        checkpoint = latest(self.directory, verify=verify, report=self._report)
        if checkpoint is not None:
            self.load(checkpoint)
        elif any(together(lambda: len(finished(self.directory)) if rank_and_size()[0] == 0 else 0, f"cannot read {self.directory}")):
            raise CheckpointError(
                f"{self.directory.parent} holds checkpoints, but none of them is valid (see the reasons above): repair one, or choose another "
                "run.dir"
            )
        return checkpoint

    def load(self, checkpoint: Checkpoint) -> None:
        """Fills model and optimizer from this checkpoint (see `load_newest`)."""
        doing = f"cannot resume from {checkpoint.path}"
        parts: list[Part] = []

        def collect() -> set[str]:
            numbers = make_room(checkpoint, self._engine)
            parts.extend(model_parts(self._chunks))
            parts.extend(optimizer_parts(self._engine.parameter_states()))
            return numbers.union(part.name for part in parts)

        names = together(collect, doing)
        _refuse_surplus(checkpoint.manifest.tensors.keys() - set().union(*names), doing)
        together(lambda: checkpoint.load_into(parts), doing)

    def maybe_wait(self) -> None:
        """Returns when weights and optimizer state may change again."""

    def close(self) -> None:
        """Returns when everything that was saved is on the disk."""


def load_weights(checkpoint: Checkpoint, chunks: Sequence[nn.Module]) -> None:
    """Fills weights and buffers alone, for evaluation, generation and new runs. Raises CheckpointError where it holds others, too."""
    doing = f"cannot load the weights of {checkpoint.path}"
    parts: list[Part] = []

    def collect() -> set[str]:
        parts.extend(model_parts(chunks))
        return {part.name for part in parts}

    stored = {name for name in checkpoint.manifest.tensors if name.startswith(f"{MODEL}/")}
    _refuse_surplus(stored - set().union(*together(collect, doing)), doing)
    together(lambda: checkpoint.load_into(parts), doing)


def _refuse_surplus(names: set[str], doing: str) -> None:
    if names:
        others = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        raise CheckpointError(f"{doing}: it holds {min(names)}{others}, which this run does not have")
