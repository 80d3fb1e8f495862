"""Reading documents: what a source's path means, and text as a stream of (name, bytes)."""

import glob
import gzip
import io
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

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
# A directory is searched for these; a file named outright may have any suffix.
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".jsonl", ".html", ".csv", ".json", ".xml", ".tex"}


class DataError(ValueError):
    """A source that cannot be read; one sentence."""


def files_of(path: str) -> list[Path]:
    """The files a source's path stands for, sorted by name. Raises DataError when there are none."""
    if path in SHIPPED:
        return [CORPUS / f"{name}.txt.gz" for name in SHIPPED[path]]
    if path.startswith("corpus:"):
        raise DataError(f"data source {path!r} does not ship with the project: use {' or '.join(SHIPPED)}")
    if path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        # Test-suites hold deliberately broken encodings; site-packages is not the standard library.
        skip = {"test", "tests", "site-packages", "idlelib", "lib2to3"}
        found = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
        return [p for p in found if p.stat().st_size > 0]
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.is_file() and _plain_suffix(p) in TEXT_SUFFIXES)
        if not found:
            raise DataError(f"data source {path!r} is a directory without text files: expected names ending in {', '.join(sorted(TEXT_SUFFIXES))}")
        return found
    if place.is_file():
        return [place]
    found = sorted(Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file())
    if not found:
        raise DataError(f"data source {path!r} does not exist: give a file, a directory, a glob, corpus:austen or stdlib")
    return found


def _plain_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _decompressed(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.suffix == ".zst":
            with path.open("rb") as file:
                return zstandard.ZstdDecompressor().stream_reader(file).read()
        return path.read_bytes()
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise DataError(f"data file {path} cannot be read ({error}): check that it is complete and of the kind its name says") from None


def _text(raw: bytes, where: str) -> bytes:
    if b"\0" in raw:
        raise DataError(f"data file {where} holds a zero byte at offset {raw.index(0)}, so it is binary: remove it from the source")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data file {where} is not UTF-8 at byte {error.start}: convert it, for instance with iconv -t UTF-8") from None
    return raw


def documents_of(path: str, text_key: str = "text") -> Iterator[tuple[str, bytes]]:
    """(name, UTF-8 text) of every document of a source, in a fixed order.

    Raises DataError for files that are missing, empty, binary or badly encoded, naming file and byte.
    """
    for file in files_of(path):
        raw = _decompressed(file)
        if not raw.strip():
            raise DataError(f"data file {file} is empty: remove it from the source, or fill it")
        if _plain_suffix(file) != ".jsonl":
            yield file.name, _text(raw, str(file))
            continue
        for number, line in enumerate(io.BytesIO(raw), start=1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"data file {where} is no JSON object ({error}): every line must be one") from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f"data file {where} has no text under {text_key!r}: set text_key to the right one of its keys")
            if text:
                yield where, text.encode()
