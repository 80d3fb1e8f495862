"""Other data from the next step on: what becomes of data.phases when a run that goes on is given others.

Samples that were read stay what they were. Phases that say the same of them are taken as they are (a phase appended behind them, a later one
changed). Others need run.allow=[data.phases]: the stored ones then end with the last sample that was read, and the given ones begin behind it,
their lengths counted from there. Started again with the same command the run finds them at the end of its stored recipe, and adds nothing.

Every source keeps its place: its cursor goes on from one phase to the next (see `data.order`), so whatever blends it has been in, none of its
windows is read twice or left out within a pass over it.
"""

from collections.abc import Sequence
from dataclasses import replace

from data.config import PhaseConfig

PHASES = "data.phases"

Phases = tuple[PhaseConfig, ...]


def going_on(stored: Phases, given: Phases, samples: int, length: int, allowed: bool) -> Phases | None:
    """The phases with which a run goes on that has read `samples` of `length` tokens; None where those that are given would change them.

    allowed: run.allow names data.phases.
    """
    if _used(stored, samples, length) == _used(given, samples, length):
        return given
    if not allowed:
        return None
    return stored if stored[-len(given) :] == given else (*_closed(stored, samples, length), *given)


def _samples_of(phase: PhaseConfig, length: int) -> int | None:
    return None if phase.tokens is None else -(-phase.tokens // length)


def _used(phases: Sequence[PhaseConfig], samples: int, length: int) -> list[tuple[object, int]]:
    """(blend, samples read) of every phase that has begun."""
    used: list[tuple[object, int]] = []
    for phase in phases:
        if samples <= 0:
            break
        whole = _samples_of(phase, length)
        read = samples if whole is None else min(whole, samples)
        used.append((phase.blend, read))
        samples -= read
    return used


def _closed(phases: Sequence[PhaseConfig], samples: int, length: int) -> Phases:
    """The phases that have begun, the last one ended where reading stopped."""
    closed = []
    for phase, (_, read) in zip(phases, _used(phases, samples, length), strict=False):
        closed.append(phase if read == _samples_of(phase, length) else replace(phase, tokens=read * length))
    return tuple(closed)
