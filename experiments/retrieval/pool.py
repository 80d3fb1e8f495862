"""Runs beside each other, each in a process of its own."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def each(train: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """`train(job)` of all jobs, as they end, `processes` at a time. What one of them raises ends them all, as soon as those at work are done."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        running = [pool.submit(train, job) for job in jobs]
        try:
            for future in as_completed(running):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


def _end_with_parent() -> None:
    """A sweep that is killed leaves no run behind that would go on alone and hold its directory."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
