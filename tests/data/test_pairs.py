"""Practice with pairs: what is asked is what was listed, and the loss counts at the values of the second time alone."""

import re
from pathlib import Path

import pytest

from data.config import DataConfig, PhaseConfig, SourceConfig, TokenizerConfig
from data.documents import DataError
from data.hashing import digest
from data.pairs import Pairs
from data.text_data import open_data

VALUES = {"number": r"[1-9]\d{6}", "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"}


@pytest.mark.parametrize(
    ("kind", "length", "apart"),
    [("number", 64, False), ("number", 129, False), ("number", 768, True), ("uuid", 256, False), ("uuid", 97, False), ("number", 73, True)],
)
def test_every_value_is_asked_again(kind: str, length: int, apart: bool) -> None:
    moved, gaps = 0, set()
    for index in range(40):
        sample = Pairs(kind, length, apart).draw(digest(index), length)
        assert len(sample.tokens) == length and (sample.tokens[1:] == sample.labels[:-1]).all()
        text = (chr(sample.tokens[0]) + bytes(sample.labels.tolist()).decode()).lstrip("\n")
        lines = re.findall(rf"([a-z]{{4,9}})( [a-z ]*)?: ({VALUES[kind]})\. ", text)
        assert "".join(f"{word}{between}: {value}. " for word, between, value in lines) == text
        half = len(lines) // 2
        first, second = ([(word, value) for word, _, value in part] for part in (lines[:half], lines[half:]))
        assert all(" mentioned in the provided text is".startswith(between) for _, between, _ in lines)
        assert not any(between for _, between, _ in lines[:half])
        gaps |= {len(between) for _, between, _ in lines[half:]}
        assert first and sorted(first) == sorted(second) and len(dict(first)) == len(first)
        moved += first != second
        counted = "".join(chr(label) if counts else " " for label, counts in zip(sample.labels, sample.counts, strict=True))
        assert counted.split() == [value for _, value in second]
    assert moved > 15 or length < 100
    assert (min(gaps), max(gaps)) == (0, 0) if not apart else len(gaps) > 15


def data_of(tmp_path: Path, path: str, kind: str = "bytes") -> DataConfig:
    tokenizer = TokenizerConfig(kind, vocab_size=300)  # type: ignore[arg-type]
    return DataConfig(
        (PhaseConfig((SourceConfig(path),)),), tokenizer, validation_fraction=0.0, cache=str(tmp_path), reset_at_document=True
    )


def test_as_a_source_texts_are_packed_and_kept_apart(tmp_path: Path) -> None:
    batch = open_data(data_of(tmp_path, "pairs:number:64"), sequence_length=256, seed=3).batch([4, 9], 0)
    assert batch.tokens.shape == (2, 256) and batch.documents is not None
    assert [len(set(row)) for row in batch.documents.tolist()] == [4, 4]
    again = open_data(data_of(tmp_path, "pairs:number:64"), sequence_length=256, seed=3).batch([9], 5)
    assert (again.tokens[0] == batch.tokens[1]).all() and (batch.tokens[0] != batch.tokens[1]).any()


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        (
            "pairs:words:64",
            "bytes",
            "is no practice with pairs: write number or uuid and the bytes of a text, for instance pairs:number:128",
        ),
        ("pairs:number:38", "bytes", "cannot hold a pair twice: use at least 39 bytes"),
        ("pairs:number:72:apart", "bytes", "cannot hold a pair twice: use at least 73 bytes"),
        ("pairs:number:100", "bytes", "of which train.sequence_length=256 is not a multiple"),
        ("pairs:uuid:64", "bytes", "cannot hold a pair twice: use at least 97 bytes"),
        ("pairs:number:64", "numbers", "is a text of bytes: set data.tokenizer.kind=bytes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path, path: str, kind: str, says: str) -> None:
    with pytest.raises(DataError, match=re.escape(says)):
        open_data(data_of(tmp_path, path, kind), sequence_length=256, seed=1)
