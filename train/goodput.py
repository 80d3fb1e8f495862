"""Where every second of a run went, from the start of its first process to now, over every kill and pause.

    useful       optimizer steps, each counted the first time it was taken
    recomputed   steps taken again, after a restart or a rewind from an older checkpoint
    data         steps stood still until their batch was there
    evaluation   evaluations
    checkpoint   training stood still for checkpoints
    startup      from the start of a process to its first step: imports, data, model, restoring
    other        the rest of a process: observers, pictures, the end
    idle         no process of the run existed

A clock runs from one `spend` to the next, so within a process no second is counted twice or not at all. What is known is kept in <run>/goodput.json,
rewritten with every logged step and every few seconds: of a process that was killed, the time since then counts as idle, which is the step it was
in, or at most INTERVAL and a step where few steps are logged. One clock, rank 0's: ranks wait for each other in every step.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

FILE_NAME = "goodput.json"
CATEGORIES = ("useful", "recomputed", "data", "evaluation", "checkpoint", "startup", "other", "idle")
INTERVAL = 5.0  # seconds between two writes while no step is logged

_runs_of_this_process = itertools.count()


@dataclass
class Start:
    """One process of a run. begin: of the process, seconds since 1970; furthest: the last step taken; seconds: by category, without idle;
    ideal: seconds the useful steps would have taken at the hardware's peak, where that is known."""

    begin: float
    furthest: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    ideal: float = 0.0

    @property
    def end(self) -> float:
        return self.begin + sum(self.seconds.values())


class Ledger:
    """The account of this process, beside those of the ones before it. path: of goodput.json; None: nothing is written (ranks above 0)."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.starts = [] if path is None else read_starts(path.parent)
        self._furthest = max((start.furthest for start in self.starts), default=0)
        now = time.time()
        # A second run of the same process begins when it begins.
        created = min(psutil.Process().create_time(), now) if next(_runs_of_this_process) == 0 else now
        begin = max(created, self.starts[-1].end if self.starts else 0.0)
        self._now = Start(begin)
        self.starts.append(self._now)
        self._mark = time.monotonic() - max(0.0, now - begin)
        self._written = -INTERVAL
        self._stepped = False

    def spend(self, category: str) -> None:
        """The time since the last call went into this category; before the first step, `other` is the start-up."""
        self._add("startup" if category == "other" and not self._stepped else category, self._passed())
        self._keep()

    def spend_step(self, step: int, waiting: float, ideal: float = 0.0) -> None:
        """The time since the last call went into step `step` (from 1), of which `waiting` seconds for data. ideal: seconds it would have taken at
        the hardware's peak."""
        self._stepped = True
        passed = self._passed()
        waiting = min(waiting, passed)
        again = step <= self._furthest
        self._add("data", waiting)
        self._add("recomputed" if again else "useful", passed - waiting)
        self._furthest = self._now.furthest = max(self._furthest, step)
        self._now.ideal += 0.0 if again else ideal
        self._keep()

    def metrics(self) -> dict[str, float]:
        """`goodput/*`: seconds by category since the run began, the share of them that was useful, and that which the hardware's peak would
        have needed (`goodput/mfu`). What is told is kept."""
        self._keep(at_once=True)
        spent = seconds_of(self.starts)
        whole = sum(spent.values())
        result = {f"goodput/{category}_seconds": spent[category] for category in CATEGORIES}
        if whole > 0:
            result["goodput/percent"] = 100.0 * spent["useful"] / whole
            if ideal := sum(start.ideal for start in self.starts):
                result["goodput/mfu"] = ideal / whole
        return result

    def close(self) -> None:
        """The last seconds of the process, and the last write."""
        self._add("other", self._passed())
        self._keep(at_once=True)

    def _passed(self) -> float:
        now = time.monotonic()
        passed, self._mark = now - self._mark, now
        return passed

    def _add(self, category: str, seconds: float) -> None:
        self._now.seconds[category] = self._now.seconds.get(category, 0.0) + seconds

    def _keep(self, at_once: bool = False) -> None:
        if self._path is None or (self._mark - self._written < INTERVAL and not at_once):
            return
        self._written = self._mark
        text = json.dumps({"starts": [asdict(start) for start in self.starts]}, indent=1) + "\n"
        with contextlib.suppress(OSError):  # a full disk: the next write holds everything again
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(text)
            partial.replace(self._path)


def read_starts(run_dir: Path) -> list[Start]:
    """The processes of a run so far, oldest first; none where the file is missing or damaged (it is an account, and no part of the run)."""
    try:
        document = json.loads((run_dir / FILE_NAME).read_text())
        return [
            Start(
                float(entry["begin"]),
                int(entry["furthest"]),
                {category: float(entry["seconds"].get(category, 0.0)) for category in CATEGORIES},
                float(entry["ideal"]),
            )
            for entry in document["starts"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def seconds_of(starts: Sequence[Start]) -> dict[str, float]:
    """Seconds of a run by category; idle is what lies between its processes."""
    result: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    for start in starts:
        for category, seconds in start.seconds.items():
            result[category] += seconds
    result["idle"] = sum(max(0.0, later.begin - earlier.end) for earlier, later in itertools.pairwise(starts))
    return result


def summary_line(metrics: dict[str, Any]) -> str | None:
    """`goodput 87.3% of 12 min: ...` for a person; None where nothing is known."""
    if "goodput/percent" not in metrics:
        return None
    spent = {category: float(metrics[f"goodput/{category}_seconds"]) for category in CATEGORIES}
    whole = sum(spent.values())
    rest = sorted(((s, c) for c, s in spent.items() if c != "useful" and s >= 0.005 * whole), reverse=True)
    parts = ", ".join(f"{category} {seconds / whole:.1%}" for seconds, category in rest)
    return f"{metrics['goodput/percent']:.1f}% of the time since the run began{f' ({parts})' if parts else ''}"
