"""Megatron's .bin/.idx: theirs is readable by us, ours by them; damage is noticed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data import indexed
from data.config import DataConfig, PhaseConfig, SourceConfig
from data.documents import DataError
from data.prepare import main
from data.text_data import open_data

DOCUMENTS = [np.arange(5), np.arange(100, 140), np.array([7])]


def write(prefix: Path, dtype: type) -> None:
    with indexed.Writer(prefix, np.dtype(dtype)) as writer:
        for document in DOCUMENTS:
            writer.add(document)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_ours(tmp_path: Path, dtype: type) -> None:
    write(tmp_path / "x", dtype)
    theirs = IndexedDataset(str(tmp_path / "x"))
    assert len(theirs) == 3 and theirs.document_indices.tolist() == [0, 1, 2, 3]
    for mine, read in zip(DOCUMENTS, theirs, strict=True):
        assert read.dtype == dtype and read.tolist() == mine.tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons(tmp_path: Path, dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    stream = indexed.read(tmp_path / "x")
    assert [stream.part(i).tolist() for i in range(3)] == [document.tolist() for document in DOCUMENTS]


def damage_index(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:-8])


def damage_tokens(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])


def damage_magic(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(b"X" + path.read_bytes()[1:])


def lose_tokens(prefix: Path) -> None:
    Path(f"{prefix}.bin").unlink()


@pytest.mark.parametrize("damage", [damage_index, damage_tokens, damage_magic, lose_tokens])
def test_damage_is_one_sentence(tmp_path: Path, damage: object) -> None:
    write(tmp_path / "x", np.uint16)
    damage(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(DataError) as error:
        indexed.read(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value) and "\n" not in str(error.value)


def test_prepared_text_is_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t").mkdir()
    for i in range(3):
        (tmp_path / "t" / f"{i}.txt").write_text(f"text {i} " * 30)
    arguments = [f"input={tmp_path / 't'}", "tokenizer=bytes", f"to={tmp_path / 'out' / 'p'}"]
    assert main(arguments) == 0
    assert "3 documents" in capsys.readouterr().out

    def opened(path: Path) -> list[int]:
        config = DataConfig(phases=(PhaseConfig((SourceConfig(str(path)),)),), validation_fraction=0.0, cache=str(tmp_path / "cache"))
        return np.asarray(open_data(config, sequence_length=8, seed=1).texts[0].train.tokens[:]).tolist()

    assert opened(tmp_path / "out" / "p") == opened(tmp_path / "t")
    for fraction in (0.1, 0.001):  # 0.001 holds nothing out of the shortest
        streams = []
        for path in (tmp_path / "out" / "p", tmp_path / "t"):
            config = DataConfig(
                phases=(PhaseConfig((SourceConfig(str(path)),)),), validation_fraction=fraction, cache=str(tmp_path / "cache")
            )
            if fraction == 0.001:
                with pytest.raises(DataError, match="holds out nothing"):
                    open_data(config, sequence_length=8, seed=1)
                continue
            data = open_data(config, sequence_length=8, seed=1)
            train, held = data.texts[0].train, data.sources[0].validation
            assert held is not None
            streams.append((train.read(0, len(train)).tolist(), train.ordinals(0, len(train)).tolist(), held.read(0, len(held)).tolist()))
        if streams:
            assert streams[0] == streams[1] and streams[0][0].count(256) == 3
    assert main(arguments) == 2  # nothing is overwritten
    assert main(["input=nowhere", "to=x"]) == 2
    assert main(["inputs=a"]) == 2
    assert main([]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") for line in errors)
