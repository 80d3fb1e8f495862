"""When a rank fails or dies, the whole job ends within seconds, and the first thing a person reads is that rank's own message.

Collectives alone do not give that: every other rank fails too, with a connection error of its own, or waits in a collective for minutes. So
each rank posts its failure in the job's store (the one torch.distributed met through) before it goes; the first notice is the job's. A thread
on each rank looks there twice a second, and looks after the processes of the other ranks on its machine, for one that was killed cannot
post anything. A rank that learns of a notice reports that instead of its own error; one that is stuck in a collective is ended.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist

from train.recipe.reading import RecipeError
from train.refusal import REFUSED, leave_for_launcher
from train.signals import STOPPED, StopRequested

INTERVAL = 0.5  # seconds between two looks
GRACE = 10.0  # seconds a rank has to end by itself after a notice
PATIENCE = 3.0  # seconds a lost connection waits for a notice that explains it

_runs_of_this_process = itertools.count()


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
    return REFUSED if isinstance(error, RecipeError) else 1


def is_defect(error: BaseException) -> bool:
    """Whether a traceback says more than the sentence does."""
    return not isinstance(error, RecipeError | RunFailed | RankFailed | StopRequested)


class Failures:
    """Open it on every rank once the process group stands, `with Failures(rank, world_size) as failures`; one rank alone has no others.

    prefix: of this run's keys in the store. The store is reached by a connection of our own, because the process group's blocks while it waits.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.notice: Notice | None = None
        self._settled = False
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._store: dist.Store | None = None

    def __enter__(self) -> "Failures":
        number = next(_runs_of_this_process)
        if self.world_size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
            prefix = f"nibble/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{number}"
            self._store = dist.PrefixStore(prefix, store)
            self._store.set(f"process/{self.rank}", str(os.getpid()))
            self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
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
        self._settled = True
        if self._store is None or isinstance(error, RankFailed):
            return error
        if _is_lost_connection(error):
            end = time.monotonic() + PATIENCE
            while self.notice is None and time.monotonic() < end:
                time.sleep(INTERVAL / 5)
        mine = Notice(self.rank, status_of(error), sentence or sentence_of(error))
        if not self._post(mine):
            assert self.notice is not None
            return RankFailed(self.notice)
        if is_defect(error):
            traceback.print_exception(error)
            sys.stderr.flush()
        return error

    def _post(self, notice: Notice) -> bool:
        """Whether this notice is the job's: it is when it is the first. A first one is printed."""
        with self._lock:
            if self.notice is not None:
                return self.notice == notice
            text = json.dumps(asdict(notice))
            held = self._tell(lambda store: store.compare_set("notice", "", text))
            self.notice = Notice(**json.loads(held)) if isinstance(held, bytes) and held else notice
            if self.notice == notice:
                leave_for_launcher(notice.sentence)
                if notice.status == REFUSED:
                    return True  # whoever reads the command line says it, once for all ranks that find the same
                print(notice.sentence, file=sys.stderr, flush=True)
            return self.notice == notice

    def _tell(self, call: object) -> object:
        """What the store answers; None when it is gone, with the rank that held it."""
        with contextlib.suppress(RuntimeError):
            return call(self._store) if self._store is not None else None  # type: ignore[operator]
        return None

    def _watch(self) -> None:
        neighbours = self._neighbours()
        while not self._closed.wait(INTERVAL):
            if self._tell(lambda store: store.check(["notice"])):
                text = self._tell(lambda store: store.get("notice"))
                if isinstance(text, bytes):
                    with self._lock:
                        self.notice = self.notice or Notice(**json.loads(text))
            for rank in sorted(neighbours):
                pid = self._process_of(rank)
                if pid is None or _lives(pid):
                    continue
                neighbours.discard(rank)
                if self.notice is None and not self._tell(lambda store, rank=rank: store.check([f"left/{rank}"])):
                    where = f"process {pid} on host {socket.gethostname()}"
                    self._post(Notice(rank, 1, f"error: rank {rank} ({where}) died without a word: it was killed, or the machine ran out of memory"))
            if self.notice is not None:
                self._closed.wait(GRACE)
                if not (self._settled or self._closed.is_set()):
                    os._exit(self.notice.status)  # the main thread waits for a rank that is gone
                return

    def _neighbours(self) -> set[int]:
        """The other ranks on this machine."""
        first = self.rank - int(os.environ.get("LOCAL_RANK", "0"))
        return set(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) - {self.rank}

    def _process_of(self, rank: int) -> int | None:
        key = f"process/{rank}"
        if not self._tell(lambda store: store.check([key])):
            return None
        held = self._tell(lambda store: store.get(key))
        return int(held) if isinstance(held, bytes) else None


def sentence_of(error: BaseException) -> str:
    """What a person reads first."""
    if isinstance(error, StopRequested):
        return f"Stopped by {error} before the first step: start the same command again to begin."
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"error: {type(error).__name__}: {text}" if is_defect(error) else f"error: {text}"


def _is_lost_connection(error: BaseException) -> bool:
    """Whether this may be nothing but the end of another rank, as gloo and NCCL report it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "timed out", "socket"))
    )


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
