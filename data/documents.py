"""Reading documents: what a source's path means, and its text as a stream of documents.

A text file is one document; a line of a JSONL file is one. Either may be compressed with gzip or zstandard. Text is UTF-8 and stays bytes
until a tokenizer wants characters. A file that is empty, cut off, binary or badly encoded stops the run: text that is dropped in silence is
found out only by what the model never learned. A few kilobytes can decompress to terabytes, so compressed text is refused where it grows beyond
what text does.
"""

import glob
import gzip
import hashlib
import io
import itertools
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

CORPUS = Path(__file__).parent / "corpus"
SHIPPED = {
    "corpus:austen": (
        "sense_and_sensibility",
        "pride_and_prejudice",
        "mansfield_park",
        "emma",
        "northanger_abbey",
        "persuasion",
    ),
    "corpus:jargon": ("jargon_file_4.4.7",),
}
COMPRESSED = {".gz", ".zst"}
JSONL = ".jsonl"
TEXT_SUFFIXES = set(
    """
    .txt .text .md .rst .tex .org .html .htm .xml .csv .tsv .json .jsonl .yaml .yml .toml .ini .cfg .log
    .py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .js .ts .go .rs .rb .sh .sql .r .jl .lua .pl .php .swift .kt .scala .hs .ml .lisp .el
    """.split()
)
LONGEST = 1 << 30  # bytes of a document: of a text file, or of a line of a JSONL file
FREE = 1 << 26  # bytes any compressed file may grow to
GROWTH = 250  # and beyond them, times its size: text reaches 4, logs 50, a bomb 1,000 and more
PIECE = 1 << 11  # bytes decompressed at once: zstandard makes at most 32,768 times as many of them
# Test suites hold deliberately broken encodings; site-packages is not the standard library.
NOT_STDLIB = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}


class DataError(ValueError):
    """Data that cannot be used; its message is one sentence."""


def files_of(path: str) -> list[Path]:
    """The files a source's path stands for, sorted by name. Raises DataError when there are none.

    A directory is searched for files with the suffix of a text file, hidden ones excepted; a file or glob must have such a suffix or none.
    """
    if path in SHIPPED:
        return [CORPUS / f"{name}.txt.gz" for name in SHIPPED[path]]
    if path.startswith("corpus:"):
        raise DataError(f"data source {path!r} does not ship with the project: use {' or '.join(SHIPPED)}")
    if path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted(p for p in root.rglob("*.py") if not NOT_STDLIB & set(p.relative_to(root).parts) and p.stat().st_size)
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.is_file() and _is_text_name(p) and not _is_hidden(p, place))
        if not found:
            raise DataError(
                f"data source {path!r} is a directory without text files: name a directory with .txt, .jsonl or other text in it"
            )
        return found
    found = [place] if place.is_file() else sorted(Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file())
    if not found:
        raise DataError(f"data source {path!r} does not exist: give a file, a directory, a glob, {', '.join(SHIPPED)} or stdlib")
    for file in found:
        if _plain_suffix(file) and not _is_text_name(file):
            raise DataError(
                f"data file {file} has the unknown extension {_plain_suffix(file)!r}: rename it to .txt or .jsonl (either also .gz or .zst) if "
                "that is what it is, or convert it"
            )
    return found


def _plain_suffix(path: Path) -> str:
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _is_text_name(path: Path) -> bool:
    return _plain_suffix(path) in TEXT_SUFFIXES


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def fingerprint(path: str) -> str:
    """Of the content of a source's files, wherever they lie."""
    total = hashlib.blake2b(digest_size=16)
    for file in files_of(path):
        with _opened(file, compressed=True) as raw:
            content = hashlib.file_digest(raw, "blake2b")  # type: ignore[arg-type]  # any readable stream will do
            total.update(_plain_suffix(file).encode() + content.digest())
    return total.hexdigest()


class _ZstandardFrames(io.RawIOBase):
    """Decompresses all frames of a file. Unlike the library's reader it refuses a file that ends in the middle of one."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.begun = False
        self.input = b""
        self.output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.output:
            if self.frame.eof:
                self.input = self.frame.unused_data
                self.frame, self.begun = zstandard.ZstdDecompressor().decompressobj(), False
            self.input = self.input or self.file.read(PIECE)
            if not self.input:
                if self.begun:
                    raise zstandard.ZstdError("it ends in the middle of a frame")
                return 0
            self.begun = True
            self.output, self.input = self.frame.decompress(self.input), b""
        size = min(len(buffer), len(self.output))
        buffer[:size], self.output = self.output[:size], self.output[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


class _Bounded(io.RawIOBase):
    """Decompressed bytes of a file of `size` bytes, as long as they are not out of all proportion."""

    def __init__(self, inner: BinaryIO, size: int):
        self.inner, self.limit, self.given = inner, max(FREE, GROWTH * size), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.inner.read(len(buffer))
        self.given += len(data)
        if self.given > self.limit:
            raise zlib.error(f"it grows to more than {self.limit:,} bytes, {GROWTH} times its size, as no text does")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.inner.close()
        super().close()


def _opened(path: Path, compressed: bool = False) -> BinaryIO:
    suffix = "" if compressed else path.suffix.lower()
    try:
        size = path.stat().st_size
        if suffix == ".gz":
            return io.BufferedReader(_Bounded(gzip.open(path), size), 1 << 20)  # type: ignore[arg-type, return-value]
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"data file {path} cannot be opened ({error.strerror}): check its name and permissions") from None
    if suffix == ".zst":
        return io.BufferedReader(_Bounded(_ZstandardFrames(file), size), 1 << 20)  # type: ignore[arg-type, return-value]
    return file


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"data file {path} cannot be read ({error}): check that it is complete and of the kind its name says")


def _whole(path: Path) -> bytes:
    try:
        with _opened(path) as file:
            content = file.read(LONGEST + 1)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise _unreadable(path, error) from None
    return _not_too_long(content, path)


def _not_too_long(document: bytes, path: Path) -> bytes:
    if len(document) > LONGEST:
        raise DataError(f"data file {path} holds a document of more than {LONGEST:,} bytes: split it")
    return document


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with _opened(path) as file:
            while line := file.readline(LONGEST + 1):
                yield _not_too_long(line, path)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise _unreadable(path, error) from None


def _check_text(raw: bytes, file: Path, offset: int = 0) -> None:
    """Raises DataError unless this is UTF-8 text; offset: of `raw` in the file (after decompression)."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"data file {file} is UTF-16, not UTF-8, from byte {offset} on: convert it, for instance with iconv -t UTF-8")
    if b"\0" in raw:
        raise DataError(f"data file {file} is binary, with a zero byte at byte {offset + raw.index(0)}: remove it from the source")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(f"data file {file} is not UTF-8 at byte {at}: convert it, for instance with iconv -t UTF-8") from None


def documents_of(path: str, text_key: str = "text") -> Iterator[bytes]:
    """UTF-8 text of every document of a source, in a fixed order.

    Raises DataError for files that are missing, empty, binary or badly encoded, naming file and byte (of the decompressed text).
    """
    for file in files_of(path):
        if _plain_suffix(file) == JSONL:
            yield from _records(file, text_key)
            continue
        raw = _whole(file)
        if not raw.strip():
            if path == "stdlib":
                continue
            raise DataError(f"data file {file} is empty: remove it from the source, or fill it")
        _check_text(raw, file)
        yield raw


def _records(file: Path, text_key: str) -> Iterator[bytes]:
    count = offset = 0
    for number, line in enumerate(_lines(file), start=1):
        where = f"data file {file} line {number}"
        if line.strip():
            _check_text(line, file, offset)
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} (byte {offset}) is no JSON ({error}): every line must be one JSON object") from None
            if not isinstance(record, dict):
                raise DataError(f"{where} (byte {offset}) is no JSON object: every line must be one, with the text under {text_key!r}")
            text = record.get(text_key)
            if not isinstance(text, str):
                known = ", ".join(repr(key[:40]) for key in itertools.islice(record, 20)) or "none"
                raise DataError(f"{where} has no text under {text_key!r}: set text_key to one of its keys ({known})")
            if not text:
                raise DataError(f"{where} holds a document of length zero: remove the line")
            try:
                yield text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{where} has half a surrogate pair at character {error.start}: repair the text") from None
            count += 1
        offset += len(line)
    if not count:
        raise DataError(f"data file {file} is empty: remove it from the source, or fill it")
