"""Which checkpoints stay on disk once a newer one is complete.

    keep         the newest so many
    keep_every   those whose step is a multiple of it, for ever
    milestones   those that were saved as one, for ever, whatever the recipe says later

A checkpoint knows by itself that it is a milestone: its manifest's state holds the name under "milestone".
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Listed:
    """A checkpoint on disk. complete: manifest and file sizes are in order; milestone: its name, None where it is none or cannot be read."""

    step: int
    complete: bool = True
    milestone: str | None = None


@dataclass(frozen=True)
class Retention:
    """keep: how many of the newest stay, None or 0: all; keep_every: in steps, 0: none stays for its step alone."""

    keep: int | None = None
    keep_every: int = 0


def superfluous(checkpoints: Iterable[Listed], retention: Retention, newest: int | None = None) -> set[int]:
    """The steps of the checkpoints that may go.

    newest: a step; later ones (of an abandoned future) neither count nor go. None: the newest there is. What is not complete never counts
    among those that stay, and goes when it is older than all of them.
    """
    listed = [entry for entry in checkpoints if newest is None or entry.step <= newest]
    complete = sorted({entry.step for entry in listed if entry.complete}, reverse=True)
    if not retention.keep or len(complete) <= retention.keep:
        return set()
    oldest = complete[retention.keep - 1]
    for_ever = {entry.step for entry in listed if entry.milestone is not None}
    if retention.keep_every:
        for_ever |= {entry.step for entry in listed if entry.step % retention.keep_every == 0}
    return {entry.step for entry in listed if entry.step < oldest} - for_ever
