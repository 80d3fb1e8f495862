"""A rank that does not come to a collective is found in time, and named, with the stacks of all."""

import datetime
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import groups
from parallel.collectives import COLLECTIVES, watch
from parallel.layout import ParallelConfig
from tests.runbook import told
from tests.train.test_failure import Job, errors
from train.hang import Report, judge

STACKS = Path("runs/x/stacks/now")


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


def report(rank: int, call: str = "all-reduce", number: int = 7, waited: float = 5.0) -> Report:
    return Report(rank, "a", 100 + rank, "step 3", number, call, waited if call else 0.0, "x/y.py:1 in z")


@pytest.mark.parametrize(
    ("reports", "rank", "said"),
    [
        (
            [report(0), report(1, call="", number=6), report(2)],
            1,
            "rank 1 (process 101 on host a) did not come: it is in step 3 at x/y.py:1",
        ),
        ([report(0, call="", number=6), report(1, call="", number=4), report(2)], 1, "did not come (nor did rank 0)"),
        ([report(0), report(2)], 1, "rank 1 did not come: its process is stopped; rank 0 has waited for 5.0 s in step 3 in all-reduce"),
        ([report(0), report(1, number=6, call="barrier"), report(2)], 1, "rank 1 is behind the others: it waits in step 3 in barrier"),
        ([report(0), report(1), report(2)], 0, "all ranks came, and yet rank 0 has waited"),
    ],
    ids=["busy", "two busy", "silent", "another collective", "all there"],
)
def test_who_did_not_come(reports: list[Report], rank: int, said: str) -> None:
    verdict = judge({r.rank: r for r in reports}, {1: "its process is stopped"}, 3, STACKS)
    assert verdict.rank == rank and said in verdict.sentence and str(STACKS) in verdict.sentence


def waits_for_the_last(rank: int) -> tuple[float | None, str, float, float | None]:
    watch()
    seen: list[Any] = []
    if rank == 0:
        timer = threading.Timer(0.3, lambda: seen.append((COLLECTIVES.waited(), COLLECTIVES.last.describe() if COLLECTIVES.last else "")))
        timer.start()
    else:
        time.sleep(0.6)
    before = COLLECTIVES.seconds
    dist.all_reduce(torch.ones(2))
    spent = COLLECTIVES.seconds - before
    return (*(seen[0] if seen else (None, "")), spent, COLLECTIVES.waited())


def test_a_collective_is_recorded(ranks: Callable[[int], Callable[..., list[Any]]]) -> None:
    first, last = ranks(2)(waits_for_the_last)
    waited, call, spent, after = first
    assert 0.05 < waited <= spent and re.fullmatch(r"all-reduce number \d+ of this rank, among ranks 0, 1", call) and after is None
    assert last[2] < spent


def collectives(rank: int) -> list[str]:
    watch()
    x, wide = torch.ones(2), torch.ones(4)
    called = []
    for call in (
        lambda: dist.all_gather_into_tensor(wide, x),
        lambda: dist.all_to_all_single(torch.empty(2), x),
        lambda: dist.reduce_scatter_tensor(x, wide),
        lambda: dist.broadcast(x, 0),
        lambda: dist.all_gather([torch.ones(2), torch.ones(2)], x),
    ):
        call()
        assert COLLECTIVES.last is not None
        called.append(COLLECTIVES.last.name)
    return called


def test_whatever_a_collective_is_called_by(ranks: Callable[[int], Callable[..., list[Any]]]) -> None:
    assert ranks(2)(collectives) == [["all-gather", "all-to-all", "reduce-scatter", "broadcast", "all-gather"]] * 2


def timeouts(rank: int, config: ParallelConfig, port: int) -> list[datetime.timedelta]:
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    groups.initialize(config, 1)
    made = list(dist.distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in made]


def test_the_timeout_reaches_every_group(ranks: Callable[[int], Callable[..., list[Any]]]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for found in ranks(2)(timeouts, ParallelConfig(tensor=2, timeout_minutes=3.5), port):
        assert len(found) > 2 and set(found) == {datetime.timedelta(minutes=3.5)}


def hangs(jobs: list[Job], run_dir: Path, *overrides: str) -> tuple[str, list[Path]]:
    """The sentence with which a job of two ranks ends in which one does not come, and the stacks it leaves."""
    job = Job(run_dir, "evaluation.faulty.rank=1", "parallel.timeout_minutes=0.2", *overrides)
    jobs.append(job)
    assert job.wait(280) != 0
    said = errors(job.text())
    assert len(said) == 1, job.text()[-4000:]
    line = said[0]
    return line, sorted((run_dir / "stacks").glob("*/rank-*.txt"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_rank_is_named(jobs: list[Job], tmp_path: Path) -> None:
    line, stacks = hangs(jobs, tmp_path / "run", "evaluation.faulty.what=stop")
    assert re.match(r"error: rank 1 did not come: its process \d+ on host \S+ is stopped \(by SIGSTOP.*; rank 0 has waited for", line), line
    told("The job hangs", line)
    assert [path.name for path in stacks] == ["rank-00000.txt", "rank-00001.txt"]
    mine, seen = (path.read_text() for path in stacks)
    assert mine.startswith("rank 0, process") and "waits in all-reduce" in mine and "in _train" in mine
    assert "seen by rank 0" in seen and "is stopped" in seen


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("moment", "place"), [("evaluation", "evaluation after step 2"), ("gradients", "step 3"), ("commit", "checkpoint after step")]
)
def test_a_sleeping_rank_is_named(moment: str, place: str, jobs: list[Job], tmp_path: Path) -> None:
    given = (f"evaluation.faulty.moment={moment}", "evaluation.faulty.what=hang", "checkpoint.every=3")
    line, stacks = hangs(jobs, tmp_path / "run", *given)
    assert re.match(
        rf"error: rank 1 \(process \d+ on host \S+\) did not come: it is in {place}.* at train/faulty.py:\d+ in strike;", line
    ), line
    assert "in strike" in stacks[1].read_text() and "waits for nobody" in stacks[1].read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_does_not_come_to_the_start_is_named(
    late: int, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "FAULTY_START", str(late))
    job = Job(tmp_path / "run", "parallel.timeout_minutes=0.2")
    jobs.append(job)
    assert job.wait(280) != 0
    (line,) = errors(job.text())
    assert line.startswith(f"error: rank {late} did not come to the start within parallel.timeout_minutes=0.2; rank {late} is process "), (
        line
    )
    assert not (tmp_path / "run").exists()
