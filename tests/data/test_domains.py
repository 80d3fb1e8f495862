"""Domains: held-out text is text no run trains on, generated text is true, and all of it follows from the seed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, PhaseConfig, SourceConfig
from data.domains import DOMAINS, Windows, domain_windows
from data.source import Source
from data.text_data import open_data
from data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def config(tmp_path: Path, **options: Any) -> DataConfig:
    return DataConfig(phases=(PhaseConfig((SourceConfig("corpus:austen"),)),), cache=str(tmp_path), **options)


def windows(domain: str, data: DataConfig, length: int = 400, count: int = 6, seed: int = 1) -> Windows:
    return domain_windows(domain, data, TOKENIZER, length=length, count=count, seed=seed, run_seed=1)


def text(found: Windows) -> str:
    return TOKENIZER.decode(np.concatenate([row[:size] for row, size in zip(found.ids, found.sizes, strict=True)]).tolist())


@pytest.mark.parametrize("domain", [domain for domain in DOMAINS if domain != "code"])
def test_the_same_whenever_it_is_asked_for(domain: str, tmp_path: Path) -> None:
    first, again, short = (windows(domain, config(tmp_path), length) for length in (400, 400, 100))
    assert np.array_equal(first.ids, again.ids) and first.ids.shape == (6, 400) and (first.sizes == 400).all()
    assert len({row.tobytes() for row in first.ids}) == 6
    generated = domain not in ("novels", "jargon")
    assert np.array_equal(first.ids[:, :100], short.ids) == generated  # those of held-out text are spread over it
    assert np.array_equal(windows(domain, config(tmp_path), seed=2).ids, first.ids) != generated


@pytest.mark.parametrize("validation", ["tail", "documents"])
def test_novels_are_what_the_run_holds_out(validation: Any, tmp_path: Path) -> None:
    data = config(tmp_path, validation=validation, validation_fraction=0.2)
    opened = open_data(data, sequence_length=400, seed=1)
    (source,) = opened.sources
    assert isinstance(source, Source)
    train = np.asarray(source.train.tokens[:]).astype(np.uint16).tobytes()
    for row in windows("novels", data).ids:
        piece = row[row < 256][:60].astype(np.uint16).tobytes()
        assert piece not in train
    assert source.train.read(1000, 60).astype(np.uint16).tobytes() in train


def test_little_text_is_filled_up(tmp_path: Path) -> None:
    found = windows("novels", config(tmp_path, validation_fraction=0.0001), length=4000, count=2)
    assert (found.sizes < 1000).all() and (found.sizes > 100).all()
    assert (found.ids[0, found.sizes[0] :] == TOKENIZER.end_of_document).all()


def test_what_is_generated_is_true(tmp_path: Path) -> None:
    for line in text(windows("arithmetic", config(tmp_path), count=1)).splitlines()[:-1]:
        left, right = line.split(" = ")
        a, sign, b = left.split()
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(right)
    rows = [line.strip("| ").split(" | ") for line in text(windows("tables", config(tmp_path), count=1)).splitlines()[:-1]]
    numbers = [[int(cell) for cell in row[1:]] for row in rows if len(row) == 4 and row[1].isdigit()]
    assert len(numbers) > 3 and all(count * price == total for count, price, total in numbers)
    records, rest = [], text(windows("json", config(tmp_path), count=1))
    while rest.count("}") > 1:
        record, end = json.JSONDecoder().raw_decode(rest.lstrip())
        records.append(record)
        rest = rest.lstrip()[end:]
    assert len(records) > 1 and [record["id"] for record in records] == list(range(records[0]["id"], records[0]["id"] + len(records)))
    pairs = text(windows("copying", config(tmp_path), count=1)).split("\n\n")[:-1]
    assert len(pairs) > 1 and all(pair.split("\nCopy: ")[0] == "Text: " + pair.split("\nCopy: ")[1] for pair in pairs)
