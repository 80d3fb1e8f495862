"""Fixtures every test may use: ranks to run on, and no process group left behind."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks import TIMEOUT, RankPool


@pytest.fixture(scope="session")
def _pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def ranks(_pool: RankPool) -> Callable[[int], Callable[..., list[Any]]]:
    """`ranks(2)(function, *args, timeout=...)`: results of `function(rank, *args)` on two ranks."""

    def of(world: int) -> Callable[..., list[Any]]:
        def run(function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
            return _pool.run(world, function, *arguments, timeout=timeout)

        return run

    return of


@pytest.fixture
def alone() -> Iterator[None]:
    """Leaves no process group behind for the next test."""
    from parallel import groups

    yield
    groups.shutdown()
