"""What this rank communicates: its newest collective, whether it waits in one, and how long it has waited in all of them.

torch tells nobody which collective a thread waits in (NCCL's flight recorder does so afterwards, for NCCL alone). Whatever a collective is called by,
it arrives at a method of ProcessGroup, and waits in Work.wait: `watch` wraps these, once a process, at about a microsecond a call.
"""

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

METHODS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "allgather_coalesced": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "gather": "gather",
    "scatter": "scatter",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "send": "send",
    "recv": "receive",
    "barrier": "barrier",
}
"""Methods of ProcessGroup, and what they are called for a person."""

SINGLE = {
    "all_gather_single": "all-gather",
    "all_gather_single_coalesced": "all-gather",
    "all_to_all_single": "all-to-all",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_single_coalesced": "reduce-scatter",
}
"""What some of them are called since torch 2.13, which has the older ones too and calls them no more."""


@dataclass(frozen=True)
class Call:
    """number: of this rank's collectives, from 1; begun: by time.monotonic; work: on a GPU, where the host does not wait."""

    number: int
    name: str
    begun: float
    group: Callable[[], Any]
    work: Any = None

    def describe(self) -> str:
        """`all-reduce number 123 of this rank, among ranks 0, 1`."""
        group, among = self.group(), ""
        if group is not None:
            with contextlib.suppress(KeyError, RuntimeError, ValueError):  # a group that is being destroyed
                ranks = dist.get_process_group_ranks(group)
                shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
                among = f", among ranks {shown}"
        return f"{self.name} number {self.number} of this rank{among}"


class Collectives:
    """last: the newest; seconds: this rank has waited in all of them, on the host's clock (on a GPU the device waits, and nothing is added)."""

    def __init__(self) -> None:
        self.last: Call | None = None
        self.seconds = 0.0
        self._number = 0
        self._depth = 0
        self._since = 0.0

    def waited(self) -> float | None:
        """For how long this rank has waited in its newest collective; None when it does not."""
        now = time.monotonic()
        if self._depth:
            return now - self._since
        last = self.last
        if last is not None and last.work is not None and not last.work.is_completed():
            return now - last.begun
        return None

    def forget(self) -> None:
        """Holds nothing of a process group any more."""
        self.last = None

    @contextmanager
    def waiting_in(self, name: str) -> Iterator[None]:
        """For what waits for other ranks without a collective of a group, as the making of groups does."""
        self._note(name, lambda: None)
        with self._inside():
            yield

    def _note(self, name: str, group: Callable[[], Any], work: Any = None) -> None:
        self._number += 1
        self.last = Call(self._number, name, time.monotonic(), group, work)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        if not self._depth:
            self._since = time.monotonic()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += time.monotonic() - self._since

    def call(self, name: str, method: Callable[..., Any], group: Any, *given: Any, **named: Any) -> Any:
        """A method of a process group, noted."""
        self._note(name, weakref.ref(group))
        with self._inside():
            work = method(group, *given, **named)
        if torch.cuda.is_available() and self.last is not None:
            self.last = Call(self.last.number, self.last.name, self.last.begun, self.last.group, work)
        return work

    def wait(self, method: Callable[..., Any], work: Any, *given: Any, **named: Any) -> Any:
        """Work.wait, noted."""
        with self._inside():
            return method(work, *given, **named)


COLLECTIVES = Collectives()
"""Of this process."""

_watched = False


def watch() -> None:
    """Wraps the methods, once. Raises AttributeError when torch lacks one of them."""
    global _watched
    if _watched:
        return

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda group, *given, **named: COLLECTIVES.call(name, method, group, *given, **named)

    for attribute, name in (METHODS | {new: name for new, name in SINGLE.items() if new in vars(dist.ProcessGroup)}).items():
        setattr(dist.ProcessGroup, attribute, noted(name, getattr(dist.ProcessGroup, attribute)))
    wait = dist.Work.wait
    dist.Work.wait = lambda work, *given, **named: COLLECTIVES.wait(wait, work, *given, **named)  # type: ignore[method-assign, assignment]
    _watched = True
