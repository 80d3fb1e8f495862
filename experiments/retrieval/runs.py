"""Runs beside each other, each in a process of its own, and the file of what finished ones reached."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

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


def read_lines(path: Path, kind: Callable[..., Result]) -> list[Result]:
    """Of a file with a result a line, `kind(**line)`; none where there is no file yet. Raises ValueError for a line that is none."""
    if not path.is_file():
        return []
    results = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            results.append(kind(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} has no result in line {number} ({error}): remove the line, and its run is made again") from None
    return results


def of_as_many_steps(path: Path, results: Sequence[Any], steps: int) -> None:
    """Raises ValueError where results (with `steps`) are of runs of other lengths, which no table should hold beside these."""
    others = sorted({result.steps for result in results} - {steps})
    if others:
        raise ValueError(
            f"{path} has runs of {others[0]} steps, and {steps} are asked for: give runs of another length a directory, runs=..."
        )


def add_line(path: Path, result: Any) -> None:
    """A dataclass, as a line that `read_lines` reads."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")
