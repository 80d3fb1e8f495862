"""What W&B has really written: the records of its own .wandb files, and the last step among them.

A .wandb file is 7 bytes and then LevelDB's log: blocks of 32 KiB, in which a record is one or more fragments of
checksum (4 bytes), length (2), kind (1; 1 whole, 2 first, 3 middle, 4 last) and payload; the payloads of a record are one protobuf message.
The last record of a killed service is often torn, and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = 7
_BLOCK = 32768
_FRAGMENT_HEADER = 7
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")


class RecordReader:
    """Reads the records of a file that may still grow: each call of `new` gives those that were completed since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = _HEADER

    def new(self) -> Iterator[Any]:
        from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # here: see WandbSession

        for payload in self._payloads():
            record = Record()
            try:
                record.ParseFromString(payload)
            except Exception:  # google.protobuf's DecodeError: what follows a damaged record cannot be trusted
                return
            yield record

    def _payloads(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            position, payload = self._position, b""
            file.seek(position)
            while True:
                left = _BLOCK - position % _BLOCK
                if left < _FRAGMENT_HEADER:  # too short for another fragment: padding
                    file.seek(left, 1)
                    position += left
                    continue
                head = file.read(_FRAGMENT_HEADER)
                if len(head) < _FRAGMENT_HEADER:
                    return
                length, kind = int.from_bytes(head[4:6], "little"), head[6]
                body = file.read(length)
                if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or len(body) < length:
                    return
                position += _FRAGMENT_HEADER + length
                payload = body if kind in (_WHOLE, _FIRST) else payload + body
                if kind in (_WHOLE, _LAST):
                    self._position = position
                    yield payload


def row_of(record: Any) -> dict[str, Any] | None:
    """The row of a record of history; None for one of another kind."""
    if record.WhichOneof("record_type") != "history":
        return None
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def last_step(reader: RecordReader) -> int:
    """The highest step among the records that are new in a file; 0: none."""
    steps = [record.history.step.num for record in reader.new() if record.WhichOneof("record_type") == "history"]
    return max(steps, default=0)


def files_of(run_dir: Path, run_id: str) -> list[Path]:
    """The .wandb files of a W&B run below <run>/wandb, oldest first; those of online starts among them."""
    found = []
    for folder in (run_dir / "wandb").glob("*run-*"):
        match = _FOLDER.fullmatch(folder.name)
        if match and match[2] == run_id:
            found += [(match[1], path) for path in folder.glob("*.wandb")]
    return [path for _, path in sorted(found)]


def last_step_written(run_dir: Path, run_id: str) -> int:
    """The last step whose row is on disk; 0: none. Each start writes only what the ones before it have not, so the newest that has any decides."""
    for path in reversed(files_of(run_dir, run_id)):
        if step := last_step(RecordReader(path)):
            return step
    return 0
