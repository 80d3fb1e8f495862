"""Data that are damaged while `python -m train` reads them: one sentence, never a crash without a word, and never silently other tokens."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data import indexed
from data.documents import documents_of
from tests.train.test_failure import Job, errors
from train.checkpoint.reader import open_checkpoint

BYTES_END = 256


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A novel as bytes, one document."""
    prefix = tmp_path / "novel"
    text = next(iter(documents_of("corpus:austen", "text")))[:300_000]
    with indexed.Writer(prefix, indexed.token_dtype(257)) as writer:
        writer.add(np.append(np.frombuffer(text, np.uint8), BYTES_END))
    return prefix


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


def started(jobs: list[Job], run_dir: Path, prefix: Path, *overrides: str, ranks: int = 1) -> Job:
    phases = f"data.phases=[{{blend:[{{path:'{prefix}'}}]}}]"
    job = Job(run_dir, phases, "train.eval_every=0", "checkpoint.every=2", "checkpoint.keep=null", *overrides, ranks=ranks, module="train")
    jobs.append(job)
    job.until(lambda: (run_dir / "checkpoints" / "step-00000002").exists(), 150)
    return job


def overwrite(prefix: Path, first: float, last: float) -> None:
    """Ids 65535 from one fraction of the file to another."""
    ids = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r+")
    ids[int(first * len(ids)) : int(last * len(ids))] = 65535
    ids.flush()


def said(job: Job) -> str:
    assert job.wait(120) in (1, 2)  # of torchrun, of the command
    (line,) = errors(job.text())
    assert open_checkpoint(job.run_dir).step >= 2
    return line


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ids_overwritten_while_two_ranks_read_them(jobs: list[Job], prefix: Path, tmp_path: Path) -> None:
    job = started(jobs, tmp_path / "run", prefix, ranks=2)
    overwrite(prefix, 0.2, 0.4)
    line = said(job)
    sentence = (
        rf"error: data source '{prefix}' holds id 65535 \(in sample \d+\), but data.tokenizer has ids 0 to 256: use the tokenizer it was"
    )
    assert re.match(sentence, line), line


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_file_that_is_cut_short_while_it_is_read(jobs: list[Job], prefix: Path, tmp_path: Path) -> None:
    job = started(jobs, tmp_path / "run", prefix)
    os.truncate(f"{prefix}.bin", 200_000)
    line = said(job)
    size = 2 * 300_001
    assert line == (
        f"error: data file {prefix}.bin has 200000 bytes instead of {size}: it was cut short since the run opened it, restore it, and start the "
        "same command again"
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("damage", ["ids", "length"])
def test_validation_text_that_is_damaged_before_an_evaluation(damage: str, jobs: list[Job], prefix: Path, tmp_path: Path) -> None:
    overrides = ("train.eval_every=40", "data.validation_fraction=0.1")
    job = started(jobs, tmp_path / "run", prefix, *overrides)
    if damage == "ids":
        overwrite(prefix, 0.95, 0.96)
        assert "the validation text of data.phases holds id 65535 (in window" in said(job)
    else:
        os.truncate(f"{prefix}.bin", 560_000)
        assert "it was cut short since the run opened it" in said(job)
