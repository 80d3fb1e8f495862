"""A collective that some rank does not come to: found before it times out, with every rank's stacks in the run directory and the absent rank named.

A thread on each rank looks twice a second how long its rank has waited in one collective. Shortly before `parallel.timeout_minutes` are over, the
first rank to run out of patience raises the alarm in the job's store. Every rank that hears of it writes <run>/stacks/<time>/rank-00000.txt (its
collective, and the Python stacks of all its threads) and reports where it is; of a rank on the same machine that does not answer, the kernel's view
of its process is written instead. Whoever raised the alarm compares the reports and posts the verdict as the job's failure, which ends all ranks (see
`train.failures`). Nobody reads all reports but that one rank, and nothing is sent while nothing hangs.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType

import psutil

from parallel.collectives import COLLECTIVES, Collectives
from train.failures import INTERVAL, Failures, Notice
from train.step_failure import Place

MARGIN = (4.0, 30.0)  # seconds before the timeout, at least and at most, at which the alarm is raised
PATIENCE = 2.0  # seconds for the reports of ranks that are alive


@dataclass(frozen=True)
class Report:
    """Where one rank is. call: what it waits in, for `waited` seconds; empty when it waits in nothing. number: of its newest collective; at: the
    innermost Python frame of its main thread."""

    rank: int
    host: str
    process: int
    place: str
    number: int
    call: str
    waited: float
    at: str


@dataclass(frozen=True)
class Verdict:
    rank: int
    sentence: str


def judge(reports: Mapping[int, Report], states: Mapping[int, str], world_size: int, stacks: Path) -> Verdict:
    """Who did not come. states: what neighbours saw of processes that gave no report."""
    waiting = [report for report in reports.values() if report.call]
    first = max(waiting, key=lambda report: report.waited)
    silent = [rank for rank in range(world_size) if rank not in reports]
    busy = sorted((report for report in reports.values() if not report.call), key=lambda report: (report.number, report.rank))
    what = f"rank {first.rank} has waited for {first.waited:.1f} s in {first.place} in {first.call}"
    if len(waiting) > 1:
        what += f", and {len(waiting) - 1} more rank{'s' * (len(waiting) > 2)} wait{'s' * (len(waiting) == 2)}"
    where = f"stacks of all ranks: {stacks}"
    if silent:
        rank = silent[0]
        state = states.get(rank, "it does not answer, and nor does any process on its machine")
        others = f" (nor did {_ranks(silent[1:])})" if silent[1:] else ""
        return Verdict(rank, f"error: rank {rank} did not come{others}: {state}; {what}; {where}")
    if busy:
        absent = busy[0]
        others = f" (nor did {_ranks([report.rank for report in busy[1:]])})" if busy[1:] else ""
        who = f"process {absent.process} on host {absent.host}"
        return Verdict(
            absent.rank, f"error: rank {absent.rank} ({who}) did not come{others}: it is in {absent.place} at {absent.at}; {what}; {where}"
        )
    behind = min(waiting, key=lambda report: (report.number, -report.waited, report.rank))
    if len({report.number for report in waiting}) == 1:
        return Verdict(
            first.rank,
            f"error: all ranks came, and yet {what}: the network or a device between them hangs, or they disagree about the collective; {where}",
        )
    return Verdict(
        behind.rank, f"error: rank {behind.rank} is behind the others: it waits in {behind.place} in {behind.call}; {what}; {where}"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


class HangWatch:
    """Open it on every rank once `failures` stands. place: what the loop is doing."""

    def __init__(
        self, failures: Failures, run_dir: Path, place: Place, timeout_minutes: float, collectives: Collectives = COLLECTIVES
    ) -> None:
        self.failures, self.place, self.collectives = failures, place, collectives
        self.stacks = run_dir / "stacks"
        seconds = timeout_minutes * 60
        self.limit = max(seconds / 2, seconds - min(max(seconds / 5, MARGIN[0]), MARGIN[1]))
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang", daemon=True)

    def __enter__(self) -> "HangWatch":
        if self.failures.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, with the rank that held it
            while not self._closed.wait(INTERVAL):
                patient = (self.collectives.waited() or 0.0) < self.limit
                if self.failures.notice is None and (not patient or self.failures.has("hang")):
                    self._raise_alarm()
                    return

    def _raise_alarm(self) -> None:
        rank = self.failures.rank
        mine = json.dumps({"rank": rank, "time": datetime.now().strftime("%Y%m%d-%H%M%S")})
        report = self._report()
        held = self.failures.agree("hang", mine)
        alarm = json.loads(held)
        directory = self.stacks / alarm["time"]
        self._write(directory, report)
        self.failures.put(f"hang/report/{rank}", json.dumps(asdict(report)))
        time.sleep(2 * INTERVAL)
        for neighbour in sorted(self.failures.neighbours()):
            if not self.failures.has(f"hang/report/{neighbour}"):
                self._look_at(neighbour, directory)
        if alarm["rank"] == rank:
            reports, states = self._collect()
            verdict = judge(reports, states, self.failures.world_size, directory)
            self.failures.post(Notice(verdict.rank, 1, verdict.sentence))

    def _report(self) -> Report:
        waited, last = self.collectives.waited(), self.collectives.last
        frame = sys._current_frames().get(self._main or 0)
        place = f"{self.place.doing} {self.place.step}" if self.place.step else self.place.doing
        waits = waited is not None and last is not None
        return Report(
            self.failures.rank,
            socket.gethostname(),
            os.getpid(),
            place,
            0 if last is None else last.number,
            last.describe() if waits and last is not None else "",
            waited or 0.0,
            _position(frame),
        )

    def _write(self, directory: Path, report: Report) -> None:
        last = self.collectives.last
        doing = f"waits in {report.call}, for {report.waited:.1f} s" if report.call else f"waits for nobody, at {report.at}"
        head = f"rank {report.rank}, process {report.process} on host {report.host}, in {report.place}: {doing}\n"
        head += (
            f"newest collective: {'none' if last is None else f'{last.describe()}, begun {time.monotonic() - last.begun:.1f} s ago'}\n\n"
        )
        with contextlib.suppress(OSError):  # a full disk does not keep the job hanging
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / f"rank-{report.rank:05d}.txt").open("w") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _look_at(self, rank: int, directory: Path) -> None:
        """A rank of this machine that gave no report: what the kernel says of its process."""
        process = self.failures.process_of(rank)
        if process is None:
            return
        state = state_of(process)
        self.failures.put(f"hang/state/{rank}", state)
        path = directory / f"rank-{rank:05d}.txt"
        if not path.exists():
            with contextlib.suppress(OSError):
                path.write_text(f"rank {rank} gave no report; seen by rank {self.failures.rank}: {state}\n{_kernel_stack(process)}")

    def _collect(self) -> tuple[dict[int, Report], dict[int, str]]:
        world, reports = self.failures.world_size, dict[int, Report]()
        end = time.monotonic() + PATIENCE
        while len(reports) < world:
            for rank in set(range(world)) - reports.keys():
                text = self.failures.read(f"hang/report/{rank}")
                if text:
                    reports[rank] = Report(**json.loads(text))
            if time.monotonic() > end:
                break
            time.sleep(INTERVAL / 2)
        absent = set(range(world)) - reports.keys()
        return reports, {rank: text for rank in absent if (text := self.failures.read(f"hang/state/{rank}"))}


def state_of(process: int) -> str:
    """`its process 123 on host vm is stopped (state T: ...)`, for a person."""
    try:
        status = psutil.Process(process).status()
    except psutil.Error:
        status = "gone"
    means = {
        psutil.STATUS_STOPPED: "is stopped (by SIGSTOP or a debugger: kill -CONT would let it go on)",
        psutil.STATUS_TRACING_STOP: "is stopped by a debugger",
        psutil.STATUS_DISK_SLEEP: "waits for a disk or a device (uninterruptible)",
        psutil.STATUS_ZOMBIE: "has died",
        "gone": "has died",
    }
    said = means.get(status, f"is {status}, and its Python does not answer (some code keeps the interpreter's lock)")
    return f"its process {process} on host {socket.gethostname()} {said}"


def _kernel_stack(process: int) -> str:
    """Where a system lets us read it."""
    lines = []
    for name in ("status", "wchan", "stack"):
        with contextlib.suppress(OSError):
            lines.append(f"--- /proc/{process}/{name}\n{Path(f'/proc/{process}/{name}').read_text()}\n")
    return "".join(lines)


def _position(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown place"
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"
