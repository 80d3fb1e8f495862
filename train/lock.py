"""A run directory has one owner at a time.

<run>/lock holds who that is, and an flock(2), which the kernel gives back however its holder ends: on one machine, and on file systems that
carry locks between machines (NFS, Lustre with -o flock), that alone decides. Some shared file systems refuse locks, or keep them on each
machine for itself, so the holder also counts up in the file every few seconds. Who finds another machine's entry watches it: a count that
moves belongs to a living run; one that stands still for half a minute was left by a crash. No clock of two machines is compared. On the
same machine a process that is gone, or a machine started anew (the boot id), tells a left entry at once.

The file is removed when the run ends.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

FILE_NAME = "lock"
BEAT_SECONDS = 5.0
DEAD_SECONDS = 30.0


class Locked(ValueError):
    """Another process owns the directory; the message is a sentence that names it."""


class RunLock:
    """Owns `directory` from `acquire` to `release`. say: receives a line when another machine's entry has to be watched."""

    def __init__(
        self,
        directory: Path,
        say: Callable[[str], None] = print,
        beat_seconds: float = BEAT_SECONDS,
        dead_seconds: float = DEAD_SECONDS,
    ) -> None:
        self.directory, self.path = directory, directory / FILE_NAME
        self._say, self._beat_seconds, self._dead_seconds = say, beat_seconds, dead_seconds
        self._file = -1
        self._made: list[Path] = []
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        """Raises Locked when another process owns the directory, and OSError where it cannot be written."""
        missing = [path for path in (self.directory, *self.directory.absolute().parents) if not path.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        self._made = missing
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                kernel_decides = self._flock(file)
                # Its last owner may have removed the file between our opening and our lock.
                if not _is(self.path, file):
                    os.close(file)
                    continue
                self._refuse_living(kernel_decides)
            except BaseException:
                os.close(file)
                raise
            break
        self._file = file
        me = psutil.Process()
        self._holder = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "process": me.pid,
            "process_started": me.create_time(),
            "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        }
        self._write(0)
        self._released.clear()
        self._beating = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Gives the directory back, and removes it if nothing was put into it."""
        if self._file < 0:
            return
        self._released.set()
        assert self._beating is not None
        self._beating.join()
        with contextlib.suppress(OSError):  # a directory that vanished meanwhile
            if _is(self.path, self._file):
                self.path.unlink()
        os.close(self._file)
        self._file = -1
        with contextlib.suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _flock(self, file: int) -> bool:
        """Whether the kernel speaks for processes of this machine; raises Locked when it says no."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(self._sentence(_read(self.path))) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                raise
            return False
        return True

    def _refuse_living(self, kernel_decides: bool) -> None:
        holder = _read(self.path)
        if not holder:
            return
        if holder.get("host") == socket.gethostname():
            if not kernel_decides and holder.get("boot") == _boot() and _runs(holder):
                raise Locked(self._sentence(holder))
            return
        self._say(f"{self.directory} was last used from host {holder.get('host')}; waiting to see whether that run is alive ...")
        end = time.monotonic() + self._dead_seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, self._dead_seconds / 4))
            now = _read(self.path)
            if not now:
                return
            if now.get("beat") != holder.get("beat"):
                raise Locked(self._sentence(now))

    def _sentence(self, holder: dict[str, Any]) -> str:
        who = f"process {holder['process']} on host {holder['host']} since {holder['since']}" if holder else "another process"
        return f"run.dir={self.directory} is in use by {who}: wait until that run ends, stop it, or choose another run.dir"

    def _write(self, beat: int) -> None:
        text = json.dumps({**self._holder, "beat": beat}).encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        os.fsync(self._file)

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(self._beat_seconds):
            beat += 1
            with contextlib.suppress(OSError):  # a full disk is reported by whoever loses data to it
                self._write(beat)


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, Any]:
    """Who the file names; {} for an empty one, and for one that is being written."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) and {"host", "process", "since"} <= holder.keys() else {}


def _boot() -> str:
    """Of this machine since it was started; a process id means something within it alone."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))


def _runs(holder: dict[str, Any]) -> bool:
    try:
        return abs(psutil.Process(holder["process"]).create_time() - holder["process_started"]) < 1.0
    except (psutil.Error, KeyError):
        return False
