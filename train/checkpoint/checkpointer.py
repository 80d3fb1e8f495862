"""The front of this room: saving and restoring a whole run, its directory kept in order.

    checkpointer = Checkpointer(run_dir, engine, chunks)
    checkpoint = checkpointer.load_newest()              # model and optimizer filled, or None: a new run
    checkpointer.save(step, state, tokens=...)           # between two steps
    checkpointer.poll()                                  # between two steps, every time: a save under way is committed here
    checkpointer.close()

Called by every rank. A save passes through three hands:

    the main thread, in `save`            agrees with the other ranks on who writes what, and copies this rank's share into host memory
    a thread of each rank                 writes and syncs the files of that rank, and never communicates
    the main thread, in a later `poll`    once every rank has written: the manifest, the rename that makes the checkpoint exist

Without `asynchronous` all of it happens in `save`, without the copy. One save is under way at a time; the next one waits for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from parallel.engine import Stateful
from train.checkpoint.background import Task
from train.checkpoint.manifest import CheckpointError, StorageError
from train.checkpoint.parts import Part
from train.checkpoint.plan import Plan
from train.checkpoint.ranks import everywhere, rank_and_size, together
from train.checkpoint.reader import Checkpoint, finished, latest
from train.checkpoint.remote import Location, locate
from train.checkpoint.retention import Retention
from train.checkpoint.staging import Staging, shortage
from train.checkpoint.state import MODEL, make_room, model_parts, number_parts, optimizer_parts, state_of_frozen
from train.checkpoint.writer import GIBIBYTE, Draft, Files, begin, clear_leftovers, delete_later, tidy

CHECKPOINTS = "checkpoints"
LOOK = 0.05  # seconds between two looks at a save that is waited for
PATIENCE = 5.0  # seconds a thread has to end once nobody wants its work any more


@dataclass(frozen=True)
class UnderWay:
    """A save between `save` and `poll`. task: this rank writes its files; finishing: all ranks have, and rank 0 sends the manifest to a store."""

    draft: Draft
    task: Task[Files]
    finishing: Task[None] | None = None

    @property
    def waited_for(self) -> Task[Files] | Task[None]:
        return self.finishing or self.task


def ignore(step: int, path: Location) -> None:
    """Nobody wants to know that a checkpoint is complete."""


def refuse(step: int, trouble: str) -> None:
    """Raises what went wrong as a CheckpointError."""
    raise CheckpointError(trouble)


class Checkpointer:
    """Checkpoints of the run in `run_dir`, in `run_dir/checkpoints`.

    chunks: this rank's model chunks. storage: a directory or URL that takes the place of `run_dir`.
    retention: which checkpoints remain after each save. asynchronous: write beside the training; auto: where
    host memory has room for a copy. shard_bytes: size limit of a file. report: gets a line, on rank 0, for each checkpoint that is passed over,
    and where auto decides against a copy. saved: hears, on every rank, of a step whose checkpoint is complete, and where it is. failed: hears of a
    step whose checkpoint could not be written, or of older ones that could not be deleted, and why; nothing that was complete before is lost.

    passed_over: what `report` said, on rank 0, of the checkpoints that the last `load_newest` or `go_back` found damaged.
    """

    def __init__(
        self,
        run_dir: Path | str,
        engine: Stateful,
        chunks: Sequence[nn.Module],
        *,
        storage: str | None = None,
        retention: Retention | None = None,
        asynchronous: bool | Literal["auto"] = False,
        shard_bytes: int = GIBIBYTE,
        report: Callable[[str], None] = print,
        saved: Callable[[int, Location], None] = ignore,
        failed: Callable[[int, str], None] = refuse,
    ):
        self.directory: Location = locate(run_dir if storage is None else storage) / CHECKPOINTS
        self._engine, self._chunks = engine, chunks
        self._retention, self._shard_bytes, self._report = retention or Retention(), shard_bytes, report
        self._asynchronous, self._staging = asynchronous, Staging()
        self._saved, self._failed = saved, failed
        self.passed_over: list[str] = []
        self._plan: Plan | None = None
        self._under_way: UnderWay | None = None
        self._deleting: tuple[int, Task[None]] | None = None

    def save(self, step: int, state: Mapping[str, Any], *, tokens: int = 0, milestone: str | None = None) -> None:
        """Writes the checkpoint of `step`, or begins to: when it returns, weights and optimizer state may change again.

        state: the loop's own, JSON values only, captured now. milestone: the name under which the checkpoint stays for ever.
        """
        self.wait()
        try:
            draft = self._begin(step, {**state, "milestone": milestone} if milestone else state, tokens)
        except StorageError as error:
            self._failed(step, str(error))
            return
        if self._copies(draft):
            copies = self._staging.copy(draft.tensors)
            self._under_way = UnderWay(draft, Task(partial(draft.write, copies), "checkpoint"))
        else:
            self._commit(draft, draft.write)

    def _begin(self, step: int, state: Mapping[str, Any], tokens: int) -> Draft:
        self._engine.settle()
        states = list(self._engine.parameter_states())
        parts: list[Part] = []
        doing = f"cannot write a checkpoint of step {step} in {self.directory}"
        together(lambda: parts.extend((*model_parts(self._chunks), *optimizer_parts(states))), doing)
        parts.extend(number_parts(states))
        draft = begin(self.directory, step, parts, state, tokens=tokens, shard_bytes=self._shard_bytes, before=self._plan)
        self._plan = draft.plan
        return draft

    def _copies(self, draft: Draft) -> bool:
        """Whether this checkpoint is copied and written beside the training; decided once."""
        if self._asynchronous == "auto":
            problem = shortage(sum(tensor.nbytes for tensor in draft.tensors))
            self._asynchronous = problem is None
            if problem is not None and draft.rank == 0:
                self._report(f"Training waits while checkpoints are written (checkpoint.asynchronous=auto), because {problem}.")
        return self._asynchronous

    @property
    def under_way(self) -> int | None:
        """The step of the save that is neither complete nor given up, the same on every rank; None: there is none."""
        return None if self._under_way is None else self._under_way.draft.step

    def poll(self) -> None:
        """Commits the save under way, if there is one, once every rank has written its files."""
        self._poll(0.0)

    def wait(self) -> None:
        """Returns when the save under way is committed, or has failed."""
        while not self._poll(LOOK):
            pass
        self._tidy(wait=True)

    def _poll(self, seconds: float) -> bool:
        """Whether nothing is under way any more. seconds: to wait for this rank's thread; ranks look again and again, lest a slow disk makes one
        wait in a collective for longer than those may take."""
        self._tidy(wait=False)
        if self._under_way is not None and everywhere(self._under_way.waited_for.wait(seconds)):
            done, self._under_way = self._under_way, None
            draft = done.draft
            if done.finishing is not None:
                finish = done.finishing.result
                self._tell(draft, lambda: draft.conclude(finish))
            elif not draft.storage.remote:
                self._commit(draft, done.task.result)
            else:
                self._begin_finishing(done)
        return self._under_way is None

    def _begin_finishing(self, done: UnderWay) -> None:
        """A request to a store may take half a minute, so a thread makes it."""
        try:
            written = done.draft.gather(done.task.result)
        except StorageError as error:
            self._failed(done.draft.step, str(error))
            return
        finishing = Task(partial(done.draft.finish, written), "checkpoint manifest")
        self._under_way = UnderWay(done.draft, done.task, finishing)

    def _commit(self, draft: Draft, write: Callable[[], Files]) -> None:
        self._tell(draft, lambda: draft.commit(write))

    def _tell(self, draft: Draft, commit: Callable[[], None]) -> None:
        try:
            commit()
        except StorageError as error:
            self._failed(draft.step, str(error))
            return
        self._saved(draft.step, draft.final)
        if draft.rank == 0 and (self._retention.keep or draft.storage.remote):
            self._deleting = draft.step, Task(partial(tidy, self.directory, draft.step, self._retention), "old checkpoints")
        if not self._asynchronous:
            self._tidy(wait=True)

    def _tidy(self, wait: bool) -> None:
        """Hears of the deletion of old checkpoints, which rank 0 does beside the training."""
        if self._deleting is None or not (wait or self._deleting[1].wait(0.0)):
            return
        (step, task), self._deleting = self._deleting, None
        try:
            task.result()
        except (OSError, StorageError) as error:
            self._failed(step, f"cannot delete checkpoints older than that of step {step}: {error}")

    def load_newest(self, *, verify: bool = True) -> Checkpoint | None:
        """Fills model and optimizer from the newest valid checkpoint, bit for bit; None where none was ever finished.

        A save under way is committed before. What a writer that was killed left behind is cleared away. verify: compare checksums first. The
        result knows `.step`, `.tokens` and the loop's `.state`. Raises CheckpointError, on every rank, if finished checkpoints are all damaged,
        or if checkpoint and run do not hold the same tensors.
        """
        self.wait()
        clear_leftovers(self.directory)
        self.passed_over = []
        checkpoint = latest(self.directory, verify=verify, report=self._pass_over)
        if checkpoint is not None:
            self.load(checkpoint)
        elif any(together(lambda: len(finished(self.directory)) if rank_and_size()[0] == 0 else 0, f"cannot read {self.directory}")):
            raise CheckpointError(
                f"{self.directory.parent} holds checkpoints, but none of them is valid (see the reasons above): repair one, or choose another "
                "run.dir"
            )
        return checkpoint

    def go_back(self, newest: int) -> Checkpoint | None:
        """Fills model and optimizer from the newest valid checkpoint of at most step `newest`, and deletes all later ones, so that nothing goes on
        from them; None, and nothing has changed, where there is none. A save under way is committed before. Collective."""
        self.wait()
        self.passed_over = []
        checkpoint = latest(self.directory, report=self._pass_over, newest=newest)
        if checkpoint is None:
            return None
        later = partial(delete_later, self.directory, checkpoint.step) if rank_and_size()[0] == 0 else lambda: None
        together(later, f"cannot delete the checkpoints after step {checkpoint.step} in {self.directory}")
        self.load(checkpoint)
        return checkpoint

    def _pass_over(self, line: str) -> None:
        self.passed_over.append(line)
        self._report(line)

    def load(self, checkpoint: Checkpoint) -> None:
        """Fills model and optimizer from this checkpoint (see `load_newest`)."""
        doing = f"cannot resume from {checkpoint.path}"
        self._engine.settle()  # what was under way must not overwrite what is read
        parts: list[Part] = []

        def collect() -> set[str]:
            numbers = make_room(checkpoint, self._engine)
            parts.extend(model_parts(self._chunks))
            parts.extend(optimizer_parts(self._engine.parameter_states()))
            return numbers.union((part.name for part in parts), state_of_frozen(checkpoint, self._chunks))

        names = together(collect, doing)
        _refuse_surplus(checkpoint.manifest.tensors.keys() - set().union(*names), doing)
        together(lambda: checkpoint.load_into(parts), doing)

    def close(self) -> None:
        """Returns when everything that was saved is on the disk."""
        self.wait()

    def abandon(self) -> None:
        """Gives up a save under way, after an error: this rank alone, without a word to the others. Older checkpoints are as they were."""
        if self._under_way is not None:
            draft, task = self._under_way.draft, self._under_way.task
            self._under_way = None
            draft.abandon()
            if task.wait(PATIENCE):
                draft.discard()


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
