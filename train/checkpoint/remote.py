"""Object stores through fsspec: a place in one behaves like a `pathlib.Path`, as far as checkpoints need it.

    locate("runs/x/checkpoints")      Path
    locate("s3://bucket/runs/x")      RemotePath, where s3fs is installed

Whatever goes wrong in a store's client is an OSError here, as on a disk. Credentials come from the environment, or from where the client finds them
by itself; they are never part of a URL.
"""

import contextlib
import fnmatch
import importlib.util
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.registry import known_implementations

from train.checkpoint.background import Task

T = TypeVar("T")

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
BLOCK = 32 << 20
"""bytes sent, or asked for, at a time"""

REQUEST_SECONDS = 120.0
"""after which a request is given up, with whatever the client tries again in that time. Clients' own limits have holes: aiohttp waits for
`100 Continue` for ever"""
# s3fs tries five times, with pauses of up to a second between.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "s3": {
        "config_kwargs": {"connect_timeout": 5, "read_timeout": 20, "retries": {"total_max_attempts": 1}},
        "default_block_size": BLOCK,
        "default_fill_cache": False,
        "use_listings_cache": False,
    }
}
EXTRAS = {"s3": "pip install -c constraints.txt -e '.[s3]'", "s3a": "pip install -c constraints.txt -e '.[s3]'"}


def is_url(text: str) -> bool:
    return URL.match(text) is not None


def url_problem(url: str) -> str | None:
    """Why nothing can be stored under this URL, as the end of a sentence that begins with it; None where it can, as far as the machine tells."""
    protocol, rest = url.split("://", 1)
    if "@" in rest or "?" in rest:
        return "holds credentials or a query: give them by environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE)"
    if protocol in ("file", "local"):
        return "is a directory: give its path without a protocol"
    if protocol not in known_implementations and protocol not in fsspec.available_protocols():
        return f"has the protocol {protocol}, which fsspec does not know: use for instance s3://bucket/prefix"
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError):
        module = known_implementations[protocol]["class"].split(".")[0] if protocol in known_implementations else protocol
        remedy = EXTRAS.get(protocol, f"pip install {module}" if importlib.util.find_spec(module) is None else f"repair {module}")
        return f"needs a package for {protocol}, which is not installed: {remedy}"
    if not rest.strip("/"):
        return f"names no bucket: write {protocol}://bucket/prefix"
    return None


def locate(where: "str | Location") -> "Location":
    """A directory or a URL. Raises OSError where nothing is installed that reads the URL."""
    if not isinstance(where, str):
        return where
    if not is_url(where):
        return Path(where)
    if problem := url_problem(where):
        raise OSError(f"{where} {problem}")
    protocol = where.split("://", 1)[0]
    fs, path = fsspec.url_to_fs(where, **OPTIONS.get(protocol, {}))
    return RemotePath(fs, path.rstrip("/"))


def asked(where: object, action: Callable[[], T]) -> T:
    """What the action returns, within the time a request has. Errors of a store's client leave as OSErrors that name the place."""
    task = Task(action, "store")  # which is left behind where it does not end
    if not task.wait(REQUEST_SECONDS):
        raise OSError(f"{where}: no answer within {REQUEST_SECONDS:g} seconds")
    try:
        return task.result()
    except FileNotFoundError:
        raise FileNotFoundError(f"{where} does not exist") from None
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{where}: {text[:300]}") from error


@dataclass(frozen=True)
class Stat:
    """What is known of an object. st_mtime: seconds since 1970, 0 where the store does not say."""

    st_size: int
    st_mtime: float


@dataclass(frozen=True)
class RemotePath:
    """A place in an object store: an object, or what stands for a directory there, a common beginning of names."""

    fs: Any
    path: str

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.fs, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.fs, self.path.rsplit("/", 1)[0])

    def __lt__(self, other: "RemotePath") -> bool:
        return self.path < other.path

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def exists(self) -> bool:
        return self._ask(lambda: bool(self.fs.exists(self.path)))

    def is_dir(self) -> bool:
        return self._ask(lambda: bool(self.fs.isdir(self.path)))

    def is_file(self) -> bool:
        return self._ask(lambda: bool(self.fs.isfile(self.path)))

    def is_symlink(self) -> bool:
        return False

    def objects(self) -> dict[str, Stat]:
        """Names and sizes of the objects directly in it, by one request; {} where there are none."""
        return {entry["name"].rsplit("/", 1)[-1]: _stat(entry) for entry in self._list() if entry["type"] != "directory"}

    def iterdir(self) -> Iterator["RemotePath"]:
        for entry in self._list():
            child = RemotePath(self.fs, entry["name"].rstrip("/"))
            if child.path != self.path:
                yield child

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Of the names directly in it."""
        return (child for child in self.iterdir() if fnmatch.fnmatchcase(child.name, pattern))

    def _list(self) -> list[dict[str, Any]]:
        try:
            return self._ask(lambda: list(self.fs.ls(self.path, detail=True)))
        except FileNotFoundError:
            return []

    def stat(self) -> Stat:
        return _stat(self._ask(lambda: self.fs.info(self.path)))

    def lstat(self) -> Stat:
        return self.stat()

    def read_bytes(self) -> bytes:
        return self._ask(lambda: bytes(self.fs.cat_file(self.path)))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes start ... stop - 1; raises OSError where there are fewer."""
        content = self._ask(lambda: bytes(self.fs.cat_file(self.path, start=start, end=stop)))
        if len(content) != stop - start:
            raise OSError(f"{self}: it ends at byte {start + len(content)}, before {stop}")
        return content

    def write_bytes(self, content: bytes) -> None:
        """One request: whoever reads finds the old content or the new one."""
        self._ask(lambda: self.fs.pipe_file(self.path, content))

    @contextmanager
    def create(self) -> Iterator["Upload"]:
        """A file to write; it exists when the block ends, and not at all when it ends with an error."""
        upload = Upload(self)
        try:
            yield upload
        except BaseException:
            upload.discard()
            raise
        upload.finish()

    def open(self, mode: str) -> io.RawIOBase:
        assert mode == "rb", mode
        return Ranges(self)

    def unlink(self) -> None:
        self._ask(lambda: self.fs.rm_file(self.path))

    def _ask(self, action: Callable[[], T]) -> T:
        return asked(self, action)


class Upload:
    """An object that is being written, sent a block at a time."""

    def __init__(self, to: RemotePath):
        self._to = to
        self._file = asked(to, lambda: to.fs.open(to.path, "wb", block_size=BLOCK))

    def write(self, content: Any) -> int:
        return asked(self._to, lambda: int(self._file.write(content)))

    def finish(self) -> None:
        asked(self._to, self._file.close)

    def discard(self) -> None:
        """What was sent is given up, also where the store does not hear of it."""
        with contextlib.suppress(OSError):
            asked(self._to, self._file.discard)
        with contextlib.suppress(AttributeError):  # not every client's file needs it
            self._file.closed = True  # or its end would complete what was begun


class Ranges(io.RawIOBase):
    """An object read from its beginning to its end, a block a request."""

    def __init__(self, source: RemotePath):
        self._source, self._size, self._next = source, source.stat().st_size, 0
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block and self._next < self._size:
            stop = min(self._size, self._next + BLOCK)
            self._block, self._next = memoryview(self._source.read_range(self._next, stop)), stop
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count


def _stat(entry: Mapping[str, Any]) -> Stat:
    changed = next((entry[key] for key in ("LastModified", "mtime", "created", "updated") if key in entry), 0.0)
    return Stat(int(entry["size"] or 0), changed.timestamp() if isinstance(changed, datetime) else float(changed))


Location = Path | RemotePath
