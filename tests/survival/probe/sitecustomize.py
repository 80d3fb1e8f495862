"""Rides along in the ranks of `python -m train`, however they are started: notes the samples that are read, and kills at a given moment.

The environment variable SURVIVAL is a JSON object: `place`, where to write; `start`, the number of this start; `kill`, or null. A kill has a
`rank`, in which its moment is looked for, `victims` (rank, other, all, launcher or everything) and one of

    {"seconds": s}                             s seconds after the process began
    {"events": [[event, regex], ...]}          before the last of these audit events, which come one after the other; the regular expressions are
                                               searched in the events' arguments
    {"call": "module:name"}                    when this function is called

with `count` (the how many-th time), `wait` (seconds the operation is held up before), `timer` (seconds that it goes on meanwhile), `partial` (only
while a checkpoint is being written) and `torn` (path of a metrics file in which half of the line is left that the function returns).
"""

import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any

SAMPLES = "data.text_data:TextData.batch"


class Probe:
    def __init__(self, order: dict[str, Any]) -> None:
        self.place, self.start, self.kill = order["place"], order["start"], order["kill"] or {}
        self.rank = int(os.environ.get("RANK", "0"))
        self.busy = threading.local()
        self.matched = self.seen = 0
        self.lock = threading.Lock()
        self._write(f"process-{self.start}-{self.rank}", str(os.getpid()))

    def open(self) -> None:
        calls: dict[str, Callable[..., Any]] = {SAMPLES: self._noting}
        if self.kill.get("rank") == self.rank:
            if "seconds" in self.kill:
                self._later(self.kill["seconds"])
            if "events" in self.kill:
                self.patterns = [(event, re.compile(text)) for event, text in self.kill["events"]]
                sys.addaudithook(self._hear)
            if "call" in self.kill:
                calls[self.kill["call"]] = self._killing
        sys.meta_path.insert(0, Wrapping(calls))

    # -- what is looked for

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(self.busy, "now", False):
            return
        wanted, pattern = self.patterns[self.matched]
        if wanted in (event, "*") and pattern.search(" ".join(map(str, arguments))):
            self.matched += 1
            if self.matched == len(self.patterns):
                self.matched = 0
                self._reached()

    def _killing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            if self.kill.get("torn"):
                line = function(*arguments, **named)
                self._reached(line)
                return line
            self._reached()
            return function(*arguments, **named)

        return wrapper

    def _noting(self, batch: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(batch)
        def wrapper(data: Any, samples: Any, step: int) -> Any:
            windows = [data.order(index) for index in samples]
            named = [[data.sources[source].path, int(window)] for source, window in windows]
            note = {"start": self.start, "step": step, "samples": list(samples), "windows": named}
            self._write(f"samples-{self.rank}.jsonl", json.dumps(note) + "\n")
            return batch(data, samples, step)

        return wrapper

    # -- the kill

    def _reached(self, line: bytes = b"") -> None:
        if self.kill.get("partial") and not self._being_written():
            return
        with self.lock:
            self.seen += 1
            if self.seen != self.kill.get("count", 1):
                return
        self.busy.now = True
        if self.kill.get("timer"):
            self._later(self.kill["timer"])
            self.busy.now = False
            return
        time.sleep(self.kill.get("wait", 0.0))
        if line:
            with open(self.kill["torn"], "ab", buffering=0) as file:
                file.write(line[: len(line) // 2])
        self.strike()

    def _being_written(self) -> bool:
        with contextlib.suppress(FileNotFoundError):  # before the first checkpoint
            return any(name.endswith(".partial") for name in os.listdir(self.kill["partial"]))
        return False

    def _later(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self.strike)
        timer.daemon = True
        timer.start()

    def strike(self) -> None:
        self.busy.now = True
        self._write("struck.jsonl", json.dumps({"start": self.start, "rank": self.rank, "time": time.time()}) + "\n")
        ranks = {}
        for name in os.listdir(self.place):
            if match := re.fullmatch(rf"process-{self.start}-(\d+)", name):
                with open(os.path.join(self.place, name)) as file:
                    ranks[int(match[1])] = int(file.read() or 0)
        others = [pid for rank, pid in ranks.items() if rank != self.rank and pid]
        launcher = [os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else []
        me = [os.getpid()]
        victims = {"rank": me, "other": others[:1], "all": others + me, "launcher": launcher, "everything": launcher + others + me}
        for pid in victims[self.kill["victims"]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _write(self, name: str, text: str) -> None:
        """At once and whole, whatever happens next."""
        before, self.busy.now = getattr(self.busy, "now", False), True
        file = os.open(os.path.join(self.place, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, text.encode())
        os.close(file)
        self.busy.now = before


class Wrapping(MetaPathFinder):
    """Wraps functions of modules as these are imported. calls: "module:name" -> a function that wraps one."""

    def __init__(self, calls: dict[str, Callable[..., Any]]) -> None:
        self.calls = calls

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        wanted = {name.split(":")[1]: wrap for name, wrap in self.calls.items() if name.split(":")[0] == fullname}
        if not wanted:
            return None
        for finder in sys.meta_path:  # an editable installation may have one of its own
            spec = finder.find_spec(fullname, path, target) if finder is not self else None
            if spec is not None:
                break
        else:
            spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Wrapped(spec.loader, wanted)  # type: ignore[assignment]
        return spec


class Wrapped(Loader):
    def __init__(self, loader: Any, wanted: dict[str, Callable[..., Any]]) -> None:
        self.loader, self.wanted = loader, wanted

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.loader.exec_module(module)
        for name, wrap in self.wanted.items():
            owner, _, attribute = name.rpartition(".")
            holder = getattr(module, owner) if owner else module
            setattr(holder, attribute, wrap(getattr(holder, attribute)))


def is_rank() -> bool:
    """Whether this is `python ... -m train`, and neither its launcher nor a helper it started."""
    arguments = sys.orig_argv
    return "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == ["train"]


if "SURVIVAL" in os.environ and is_rank():
    Probe(json.loads(os.environ["SURVIVAL"])).open()
