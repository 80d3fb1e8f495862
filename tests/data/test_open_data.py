"""From files to batches, through the public door."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from data import indexed
from data.config import DataConfig, PhaseConfig, SourceConfig, TokenizerConfig
from data.documents import CORPUS, SHIPPED, DataError
from data.text_data import TextData, open_data

AUSTEN = (PhaseConfig((SourceConfig("corpus:austen"),)),)


def data_of(tmp_path: Path, *phases: PhaseConfig, length: int = 16, seed: int = 1, **options: Any) -> TextData:
    config = DataConfig(phases=phases, cache=str(tmp_path / "cache"), **options)
    config.validate()
    return open_data(config, sequence_length=length, seed=seed)


def blend(*sources: tuple[Path | str, float], tokens: int | None = None) -> PhaseConfig:
    return PhaseConfig(tuple(SourceConfig(str(path), weight) for path, weight in sources), tokens)


@pytest.fixture
def letters(tmp_path: Path) -> dict[str, Path]:
    """Three sources, each of one letter, so that a token tells its source."""
    result = {}
    for letter in "abc":
        result[letter] = tmp_path / f"{letter}.txt"
        result[letter].write_text(letter * 5000)
    return result


def rows(data: TextData, samples: Any) -> torch.Tensor:
    return data.batch(list(samples), 0).tokens


def test_a_sample_is_a_function_of_seed_and_index_alone(tmp_path: Path, letters: dict[str, Path]) -> None:
    phase = blend((letters["a"], 0.5), (letters["b"], 0.3), (letters["c"], 0.2))
    data = data_of(tmp_path, phase)
    whole = rows(data, range(3000))
    fresh = data_of(tmp_path, phase)
    scattered = [2999, 0, 1500, 7, 1024, 1023]
    assert torch.equal(rows(fresh, scattered), whole[scattered])
    assert torch.equal(torch.cat([rows(fresh, range(i, i + 5)) for i in range(0, 100, 5)]), whole[:100])
    assert not torch.equal(rows(data_of(tmp_path, phase, seed=2), range(100)), whole[:100])
    shares = [(whole[:, 3] == ord(letter)).float().mean().item() for letter in "abc"]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=2e-3)


def test_an_appended_phase_leaves_earlier_samples_and_cursors_alone(tmp_path: Path, letters: dict[str, Path]) -> None:
    first = blend((letters["a"], 0.5), (letters["b"], 0.5), tokens=16 * 700)
    second = blend((letters["b"], 0.25), (letters["c"], 0.75), tokens=16 * 500)
    third = blend((letters["c"], 1.0))
    two, three = data_of(tmp_path, first, second), data_of(tmp_path, first, second, third)
    assert [two.order(i) for i in range(1200)] == [three.order(i) for i in range(1200)]
    seen: dict[int, list[int]] = {}
    for index in range(1600):
        source, window = three.order(index)
        seen.setdefault(source, []).append(window)
    for source, windows in seen.items():  # a source's epoch goes on across phases: every window once before any again
        size = (len(three.texts[source].train) - 1) // 16
        for start in range(0, len(windows) - size + 1, size):
            assert sorted(windows[start : start + size]) == list(range(size)), source
    with pytest.raises(DataError, match=r"data\.phases"):
        two.order(1200)


def test_labels_are_the_next_tokens(tmp_path: Path) -> None:
    data = data_of(tmp_path, *AUSTEN, length=64)
    batch = data.batch([5, 9], 3)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.loss_mask.all() and not batch.documents.any() and not batch.reset
    assert batch.sample.tolist() == [5, 9] and batch.step == 3


def test_documents_are_numbered_and_targets_across_them_masked(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("ab", "cde", "f" * 200)))
    data = data_of(tmp_path, blend((path, 1.0)), length=8, validation_fraction=0.0, reset_at_document=True)
    window = next(i for i in range(100) if data.order(i)[1] == 0)
    batch = data.batch([window], 0)
    end = 256
    assert batch.tokens[0].tolist() == [97, 98, end, 99, 100, 101, end, 102]
    assert batch.documents[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert batch.loss_mask[0].tolist() == [True, True, False, True, True, True, False, True]


def test_long_and_short_batches_take_turns(tmp_path: Path) -> None:
    short = data_of(tmp_path, *AUSTEN, alternate_length=4)
    long = data_of(tmp_path, *AUSTEN)
    for step, pieces in ((0, [0] * 16), (1, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4), (2, [0] * 16)):
        batch, whole = short.batch([5, 6], step), long.batch([5, 6], step)
        assert batch.documents.tolist() == [pieces, pieces] and batch.reset == bool(step % 2)
        for name in ("tokens", "labels", "loss_mask"):  # every token of every piece has its target
            assert torch.equal(getattr(batch, name), getattr(whole, name))


def test_short_pieces_and_documents_are_kept_apart_together(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * size}) for size in (5, 9, 2, 30, 7) * 20))
    options: dict[str, Any] = {"reset_at_document": True, "validation_fraction": 0.0}
    whole = data_of(tmp_path, blend((path, 1.0)), **options).batch(range(20), 1)
    cut = data_of(tmp_path, blend((path, 1.0)), alternate_length=4, **options).batch(range(20), 1)
    border = torch.arange(1, 16) % 4 == 0
    apart = whole.documents[:, 1:] != whole.documents[:, :-1]
    assert apart.any()
    assert torch.equal(cut.documents[:, 1:] != cut.documents[:, :-1], apart | border)
    assert torch.equal(cut.loss_mask, whole.loss_mask)


def test_the_tail_of_every_novel_is_predicted_once_and_never_trained_on(tmp_path: Path) -> None:
    data = data_of(tmp_path, *AUSTEN, length=128)
    predicted = [int(token) for batch in data.validation_batches(16) for token in batch.labels[batch.loss_mask]]
    tails, train = [], bytes(np.asarray(data.texts[0].train.tokens[:]).clip(max=255).astype(np.uint8))
    for name in SHIPPED["corpus:austen"]:
        text = gzip.decompress((CORPUS / f"{name}.txt.gz").read_bytes())
        tail = text[len(text) - int(len(text) * 0.05) :]
        tails.append(tail)
        assert tail[:200] not in train and tail[-200:] not in train
    assert sorted(predicted) == sorted(b"".join(tails))
    assert len(predicted) == data.validation_tokens == sum(map(len, tails))
    assert data.bytes_per_token == 1.0


def test_count_models_reach_what_such_models_reach_on_the_novels(tmp_path: Path) -> None:
    baselines = data_of(tmp_path, *AUSTEN).count_baselines()
    assert baselines is not None
    assert baselines.trigram == pytest.approx(1.91, abs=0.02) and baselines.bigram == pytest.approx(2.44, abs=0.02)


def test_every_kind_of_file(tmp_path: Path) -> None:
    place = tmp_path / "files"
    place.mkdir()
    text = "Ein Text mit Umlauten: äöü. " * 20
    (place / "plain.txt").write_text(text)
    (place / "zipped.txt.gz").write_bytes(gzip.compress(text.encode()))
    (place / "zipped.txt.zst").write_bytes(zstandard.compress(text.encode()))
    lines = "\n".join(json.dumps({"text": text, "id": i}) for i in range(2))
    (place / "lines.jsonl").write_text(lines)
    (place / "lines.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    expected = [*text.encode(), 256]
    for name in ("plain.txt", "zipped.txt.gz", "zipped.txt.zst", "lines.jsonl", "lines.jsonl.zst", "pl*.txt"):
        data = data_of(tmp_path, blend((place / name, 1.0)), validation_fraction=0.0)
        assert np.asarray(data.texts[0].train.tokens[:]).tolist() == expected * (2 if "jsonl" in name else 1), name
    assert len(data_of(tmp_path, blend((place, 1.0)), validation_fraction=0.0).texts[0].train.lengths) == 7


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    data = data_of(tmp_path, blend(("stdlib", 1.0)), length=64)
    assert len(data.texts[0].train) > 5_000_000
    assert "import" in data.tokenizer.decode(np.asarray(data.texts[0].train.tokens[:200_000]).tolist())


WRONG = {
    "missing": (None, "does not exist"),
    "empty.txt": (b"", "empty"),
    "binary.txt": (b"abc\0def", "byte 3"),
    "latin.txt": (b"caf\xe9 au lait", "byte 3"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2"),
    "nokey.jsonl": (b'{"body": "a"}\n', "text_key"),
    "cut.txt.gz": (gzip.compress(b"hello world" * 100)[:-12], "cannot be read"),
    "cut.txt.zst": (zstandard.compress(b"hello world" * 100)[:-5], "cannot be read"),
    "notzip.txt.gz": (b"plain text", "cannot be read"),
    "short.txt": (b"ab", "fewer than one sequence"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_cannot_be_used_are_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    content, said = WRONG[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        data_of(tmp_path, blend((path, 1.0)), validation_fraction=0.0)
    message = str(error.value)
    assert str(path) in message and said in message and "\n" not in message
    if name != "short.txt":  # which is good text, only too little of it
        assert not list(tmp_path.glob("cache/**/*.bin"))


def test_a_directory_without_text(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="without text files"):
        data_of(tmp_path, blend((tmp_path / "x", 1.0)))


def test_whole_documents_for_validation(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    texts = [f"document number {i} " * 5 for i in range(50)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = data_of(tmp_path, blend((path, 1.0)), validation="documents", validation_fraction=0.2)
    train = data.tokenizer.decode(np.asarray(data.texts[0].train.tokens[:]).tolist())
    held = [text for text in texts if text not in train]
    assert len(held) == 10
    predicted = [int(t) for batch in data.validation_batches(4) for t in batch.labels[batch.loss_mask]]
    assert sorted(predicted) == sorted("".join(held).encode())


def test_a_bpe_is_trained_once_and_deterministic(tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=400)
    first = data_of(tmp_path / "one", *AUSTEN, tokenizer=tokenizer, length=64)
    second = data_of(tmp_path / "two", *AUSTEN, tokenizer=tokenizer, length=64)
    assert first.tokenizer.key == second.tokenizer.key
    assert torch.equal(rows(first, range(8)), rows(second, range(8)))
    assert first.tokenizer.vocab_size == 400 and first.bytes_per_token is not None and first.bytes_per_token > 1.5
    assert first.tokenizer.decode(first.tokenizer.encode("Emma Woodhouse").tolist()) == "Emma Woodhouse"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_tokenizer_loads_in_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    config = TokenizerConfig(kind=kind, vocab_size=400 if kind == "bpe" else None)  # type: ignore[arg-type]
    ours = data_of(tmp_path, *AUSTEN, tokenizer=config).tokenizer
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    text = "Naïve café ☃ 𝄞 \n\t hello  world"
    assert theirs(text).input_ids == ours.encode(text).tolist()
    assert theirs.eos_token_id == ours.end_of_document
    again = data_of(tmp_path, *AUSTEN, tokenizer=TokenizerConfig(kind="file", path=str(tmp_path / "saved" / "tokenizer.json"))).tokenizer
    assert again.encode(text).tolist() == ours.encode(text).tolist() and again.end_of_document == ours.end_of_document
    with pytest.raises(DataError, match=r"data\.tokenizer\.end_of_document='</none>'"):
        data_of(
            tmp_path,
            *AUSTEN,
            tokenizer=TokenizerConfig(kind="file", path=str(tmp_path / "saved" / "tokenizer.json"), end_of_document="</none>"),
        )


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_damage_after_a_pair_was_opened(tmp_path: Path, fraction: float) -> None:
    with indexed.Writer(tmp_path / "x", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(20_000) % 256)
    data = data_of(tmp_path, blend((tmp_path / "x", 1.0)), validation_fraction=fraction)
    data.batch([0, 1], 0)
    ids = np.memmap(tmp_path / "x.bin", dtype=np.uint16, mode="r+")
    ids[:] = 999
    with pytest.raises(DataError, match=r"holds id 999 \(in sample 0\), but data.tokenizer has ids 0 to 256: use the tokenizer"):
        data.batch([0, 1], 0)
    os.truncate(tmp_path / "x.bin", 10_000)
    cut = r"x.bin has 10000 bytes instead of 40000: it was cut short since the run opened it, restore it, and start the same command again"
    with pytest.raises(DataError, match=cut):
        data.batch([0, 1], 0)
    if fraction:
        with pytest.raises(DataError, match=cut):
            data.validation_batches(1)[0]
        os.truncate(tmp_path / "x.bin", 40_000)
        with pytest.raises(
            DataError, match=r"validation text of data.phases holds id \d+ \(in window 0\), but data.tokenizer has ids 0 to 256"
        ):
            ids[:] = 999
            data.validation_batches(1)[0]
