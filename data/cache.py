"""Directories that are built once: complete or absent, and built by one process while the others wait."""

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.documents import DataError


def cached(place: Path, build: Callable[[Path], None]) -> Path:
    """`place`, filled by `build(directory)` when it does not exist yet.

    The directory is filled under another name and renamed, so a killed process leaves nothing that looks finished. Processes of one machine
    take turns (ranks that start together do the work once); machines that share a disk may both build, and the first to finish wins.
    Raises DataError where the directory cannot be written.
    """
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _turn(place.with_name(f".{place.name}.lock")):
            if place.is_dir():
                return place
            partial = place.with_name(f".{place.name}.{socket.gethostname()}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                try:
                    os.rename(partial, place)
                except OSError:
                    if not place.is_dir():
                        raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(f"data.cache={str(place.parent)!r} cannot be written ({error.strerror}): name another directory") from None
    return place


@contextmanager
def _turn(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
