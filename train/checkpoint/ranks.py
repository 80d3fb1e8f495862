"""Agreement between ranks: what one of them cannot do, none of them does."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from train.checkpoint.manifest import CheckpointError, StorageError

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """(rank, number of ranks) of the default process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def exchange(value: T) -> list[T]:
    """Every rank's value, by rank."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    values: list[T] = [value] * size
    dist.all_gather_object(values, value)
    return values


def everywhere(truth: bool) -> bool:
    """Whether this is true on every rank: one small all-reduce, cheap enough for every step."""
    if rank_and_size()[1] == 1:
        return truth
    flag = torch.tensor(int(truth), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def together(action: Callable[[], T], doing: str) -> list[T]:
    """Runs `action` on every rank and returns every rank's result; if it fails anywhere, raises everywhere, so that
    no rank waits for another: StorageError where nothing but OSErrors stood in the way.

    doing: begins the sentence of the error, as in "cannot write checkpoint DIR".
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    mine = None if failure is None else (_sentence(failure), isinstance(failure, OSError | StorageError))
    outcomes = exchange((result, mine))
    problems = [(rank, *problem) for rank, (_, problem) in enumerate(outcomes) if problem]
    if failure is not None and not isinstance(failure, (OSError, CheckpointError)):
        raise failure  # a defect keeps its traceback
    if problems:
        rank, sentence, _ = next((problem for problem in problems if not problem[2]), problems[0])
        whose = f" (rank {rank})" if len(outcomes) > 1 else ""
        raise (StorageError if all(storage for *_, storage in problems) else CheckpointError)(f"{doing}: {sentence}{whose}") from failure
    return [result for result, _ in outcomes]  # type: ignore[misc]


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
