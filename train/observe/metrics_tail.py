"""The rows of a metrics.jsonl that is being written, each once and only when it is final."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.observe.metrics import FILE_NAME, decode_lines

_CHUNK = 1 << 20  # bytes a reading takes


class MetricsTail:
    """Reads <run>/metrics.jsonl beside its writer, from any thread.

    A row is final when the next one has begun, as an evaluation joins the row of its step. after: rows up to this step are left out.
    """

    def __init__(self, run_dir: Path, after: int) -> None:
        self._path = run_dir / FILE_NAME
        self._after = after
        self._offset = 0
        self._file = self._files = 0  # which one is read, and how often it was shortened

    def rewind(self) -> None:
        """The file was shortened, and nothing is behind that yet: it is read again from its start, and gives no row twice. From any thread."""
        self._files += 1

    def rows(self, last: bool = False) -> Iterator[dict[str, Any]]:
        """The final rows that are new, in order; last: the last one is final as well."""
        while True:
            file = self._files
            if file != self._file:
                self._file, self._offset = file, 0
            chunk = self._chunk(last)
            if file != self._files:  # shortened while it was read
                continue
            if not chunk:
                return
            for row in decode_lines(chunk):
                if row["step"] > self._after:
                    self._after = row["step"]
                    yield row
            self._offset += len(chunk)

    def _chunk(self, last: bool) -> bytes:
        """Whole lines, about a mebibyte of them."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read(_CHUNK)
        except FileNotFoundError:
            return b""
        end = content.rfind(b"\n") + 1
        if not last:  # without the last of them
            end = content.rfind(b"\n", 0, max(0, end - 1)) + 1
        return content[:end]
