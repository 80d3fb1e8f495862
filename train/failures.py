"""When a rank fails or dies, the whole job ends within seconds, and the first thing a person reads is that rank's own message.

Collectives alone do not give that: every other rank fails too, with a connection error of its own, or waits in a collective for minutes. So
each rank posts its failure in the job's store (the one torch.distributed met through) before it goes; the first notice is the job's. A thread
on each rank looks there twice a second, and looks after the processes of the other ranks on its machine, for one that was killed cannot
post anything. A rank that learns of a notice reports that instead of its own error; one that is stuck in a collective is ended.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist

from data.documents import DataError
from train.checkpoint.manifest import CheckpointError
from train.recipe.reading import RecipeError
from train.refusal import REFUSED, leave_for_launcher
from train.signals import STOPPED, StopRequested

INTERVAL = 0.5  # seconds between two looks
GRACE = 10.0  # seconds a rank has to end by itself after a notice
LAST = 90.0  # seconds it may then take to close what it holds
PATIENCE = 3.0  # seconds a lost connection waits for a notice that explains it

REFUSALS = (RecipeError, DataError, CheckpointError)  # sentences for whoever wrote the recipe


class RunFailed(Exception):
    """Ends a run for a reason that is no defect; the message is a sentence."""


@dataclass(frozen=True)
class Notice:
    """rank: that failed or died; status: what the job exits with; sentence: why."""

    rank: int
    status: int
    sentence: str


class RankFailed(Exception):
    """Another rank failed or died, as its notice says."""

    def __init__(self, notice: Notice) -> None:
        super().__init__(notice.sentence)
        self.notice = notice


def status_of(error: BaseException) -> int:
    """The exit status of a process that ends with this error."""
    if isinstance(error, RankFailed):
        return error.notice.status
    if isinstance(error, StopRequested):
        return STOPPED
    return REFUSED if isinstance(error, REFUSALS) else 1


def is_defect(error: BaseException) -> bool:
    """Whether a traceback says more than the sentence does."""
    return not isinstance(error, (*REFUSALS, RunFailed, RankFailed, StopRequested))


class Failures:
    """What one rank knows of the failures of all. status: what this process exits with when nothing fails."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.status = 0
        self.notice: Notice | None = None
        self._ended: BaseException | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._store: dist.Store | None = None

    def open(self) -> None:
        """Once the process group stands. The store is reached by a connection of our own: the process group's blocks while it waits."""
        if self.world_size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
            # Of this start alone: a launcher's store keeps what the ranks of an earlier one have said.
            name: list[str] = [uuid.uuid4().hex]
            dist.broadcast_object_list(name, src=0)
            self._store = dist.PrefixStore(f"nibble/{name[0]}", store)
            self._store.set(f"process/{self.rank}", str(os.getpid()))
            self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)
            self._thread.start()

    def meet(self) -> None:
        """Waits for the other ranks at the end of a run that did not fail: a launcher ends them when one exits with a status before they do."""
        if self.world_size > 1 and self._ended is None:
            dist.barrier()

    def close(self) -> None:
        self._tell(lambda store: store.set(f"left/{self.rank}", ""))
        if self.notice is not None and self.rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
            time.sleep(2 * INTERVAL)  # the store may be ours: the others read the notice first
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def settle(self, error: BaseException, sentence: str | None = None) -> BaseException:
        """What ended the job: `error` itself, or RankFailed where another rank's notice explains it. The first rank to fail speaks here.

        sentence: for a person, instead of the error's own message.
        """
        if self._ended is None:
            self._ended = self._settle(error, sentence)
        return self._ended

    def _settle(self, error: BaseException, sentence: str | None) -> BaseException:
        said = sentence if sentence and is_defect(error) else sentence_of(error)
        if self._store is None:
            if not isinstance(error, REFUSALS):
                print(said, file=sys.stderr, flush=True)
            return error
        if _is_lost_connection(error):
            end = time.monotonic() + (3 * PATIENCE if self.has("hang") else PATIENCE)  # a verdict is on its way
            while self.notice is None and time.monotonic() < end:
                time.sleep(INTERVAL / 5)
        mine = Notice(self.rank, status_of(error), said)
        if not self.post(mine):
            assert self.notice is not None
            return RankFailed(self.notice)
        if is_defect(error):
            traceback.print_exception(error)
            sys.stderr.flush()
        return error

    def post(self, notice: Notice) -> bool:
        """Whether this notice is the job's: it is when it is the first. A first one is printed."""
        with self._lock:
            if self.notice is not None:
                return self.notice == notice
            text = json.dumps(asdict(notice))
            self.notice = Notice(**json.loads(self.agree("notice", text)))
            if self.notice == notice:
                leave_for_launcher(notice.sentence)
                if notice.status == REFUSED:
                    return True  # whoever reads the command line says it, once for all ranks that find the same
                print(notice.sentence, file=sys.stderr, flush=True)
            return self.notice == notice

    def _tell(self, call: Callable[[dist.Store], object]) -> object:
        """What the store answers; None when it is gone, with the rank that held it."""
        with contextlib.suppress(RuntimeError):
            return call(self._store) if self._store is not None else None
        return None

    def has(self, key: str) -> bool:
        """Whether some rank has put it."""
        return bool(self._tell(lambda store: store.check([key])))

    def put(self, key: str, text: str) -> None:
        """For every rank to read."""
        self._tell(lambda store: store.set(key, text))

    def read(self, key: str) -> str:
        """Empty while nobody has put it."""
        held = self._tell(lambda store: store.get(key)) if self.has(key) else None
        return held.decode() if isinstance(held, bytes) else ""

    def agree(self, key: str, text: str) -> str:
        """What the first rank to say something under this key has said; `text` on that rank, and where the store is gone."""
        held = self._tell(lambda store: store.compare_set(key, "", text))
        return held.decode() if isinstance(held, bytes) and held else text

    def _watch(self) -> None:
        neighbours = self.neighbours()
        while not self._closed.wait(INTERVAL):
            if text := self.read("notice"):
                with self._lock:
                    self.notice = self.notice or Notice(**json.loads(text))
            for rank in sorted(neighbours):
                pid = self.process_of(rank)
                if pid is None or _lives(pid):
                    continue
                neighbours.discard(rank)
                if self.notice is None and not self.has(f"left/{rank}"):
                    where = f"process {pid} on host {socket.gethostname()}"
                    self.post(
                        Notice(
                            rank, 1, f"error: rank {rank} ({where}) died without a word: it was killed, or the machine ran out of memory"
                        )
                    )
            if self.notice is not None:
                self._closed.wait(GRACE)
                if self._ended is not None:
                    self._closed.wait(LAST)
                if not self._closed.is_set():
                    os._exit(self.notice.status)  # the main thread waits for a rank that is gone
                return

    def neighbours(self) -> set[int]:
        """The other ranks on this machine."""
        first = self.rank - int(os.environ.get("LOCAL_RANK", "0"))
        return set(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) - {self.rank}

    def process_of(self, rank: int) -> int | None:
        held = self.read(f"process/{rank}")
        return int(held) if held else None


@contextmanager
def failing_together(rank: int, world_size: int) -> Iterator[Failures]:
    """Open it on every rank once the process group stands. An error leaves it as it was raised in a process that is alone, or on the first rank
    to find a wrong recipe; any other is told to a person here, and becomes `status`."""
    failures = Failures(rank, world_size)
    failures.open()
    try:
        yield failures
    except BaseException as error:
        ended = failures.settle(error)
        failures.status = status_of(ended)
        told = isinstance(ended, StopRequested | RunFailed | RankFailed) or (world_size > 1 and is_defect(ended))
        if not told:
            raise
    finally:
        failures.close()


def sentence_of(error: BaseException) -> str:
    """What a person reads first."""
    if isinstance(error, StopRequested):
        return f"Stopped by {error} before the first step: start the same command again to begin."
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"error: {type(error).__name__}: {text}" if is_defect(error) else f"error: {text}"


def _is_lost_connection(error: BaseException) -> bool:
    """Whether this may be nothing but the end of another rank, as gloo and NCCL report it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "timed out", "socket"))
    )


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
