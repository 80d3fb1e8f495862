"""Needles: every text is what RULER's rules ask for, read back by expressions of this file."""

import re
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig, PhaseConfig, SourceConfig, TokenizerConfig
from data.documents import DataError
from data.hashing import digest
from data.needle import KINDS, Needles, novels
from data.text_data import open_data

WORD, NUMBER = r"[a-z]{4,9}-[a-z]{4,9}", r"[1-9]\d{6}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
RULES = {  # haystack, key, value, what a value is called, needles that the text must have; None: many
    "niah_single_1": ("noise", WORD, NUMBER, "number", 1),
    "niah_single_2": ("novel", WORD, NUMBER, "number", 1),
    "niah_single_3": ("novel", WORD, UUID, "uuid", 1),
    "niah_multikey_1": ("novel", WORD, NUMBER, "number", 4),
    "niah_multikey_2": ("needle", WORD, NUMBER, "number", None),
    "niah_multikey_3": ("needle", UUID, UUID, "uuid", None),
}
SENTENCES = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [768, 3000])
def test_a_text_hides_its_answer_as_the_rules_say(name: str, length: int) -> None:
    assert RULES.keys() == KINDS.keys()
    haystack, key, value, kind, count = RULES[name]
    places = []
    for index in range(12):
        sample = Needles(name).draw(digest(index), length)
        assert len(sample.tokens) == length and (sample.tokens[1:] == sample.labels[:-1]).all(), "targets are the next bytes"
        text = bytes(sample.tokens.tolist()).decode() + chr(sample.labels[-1])
        answer = bytes(sample.labels[sample.counts].tolist()).decode()
        assert re.fullmatch(value, answer) and text.endswith(answer) and sample.counts.sum() == len(answer)
        opening = f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        match = re.fullmatch(
            rf"{opening}I will quiz you about the {kind} afterwards\.\n(.*)\nWhat is the special magic {kind} for ({key}) mentioned in the "
            rf"provided text\? The special magic {kind} for \2 mentioned in the provided text is {answer}",
            text,
            re.DOTALL,
        )
        assert match, text
        context, asked = match[1], match[2]
        needles = re.findall(rf"One of the special magic {kind}s for ({key}) is: ({value})\.", context)
        assert (asked, answer) in needles and len(dict(needles)) == len(needles)
        assert len(needles) == count if count else len(needles) > length / 300
        places.append(context.index(f"for {asked} is: ") / len(context))
        rest = re.sub(rf"One of the special magic {kind}s for {key} is: {value}\.[ \n]?", "", context)
        if haystack == "noise":
            assert all(line in ("", SENTENCES) for line in rest.split("\n")[1:]) and SENTENCES.endswith(rest.split("\n")[0])
        elif haystack == "novel":
            assert rest[:60] in novels().train
    assert max(places) - min(places) > 0.3, "anywhere in the text"


def test_evaluation_reads_novels_that_training_does_not() -> None:
    train, held = novels().train, novels().held
    assert len(held) > 150_000 and len(train) > 10 * len(held)
    for index in range(20):
        text, _ = Needles("niah_single_2", held=True).text(digest(index), 1200)
        piece = max(re.split(r"\n|One of the special[^:]*: \d+\. ", text)[1:-1], key=len)[5:105]
        assert piece in held and piece not in train


def data_of(tmp_path: Path, path: str, length: int, kind: str = "bytes") -> DataConfig:
    tokenizer = TokenizerConfig(kind, vocab_size=300)  # type: ignore[arg-type]
    return DataConfig((PhaseConfig((SourceConfig(path),)),), tokenizer, validation_fraction=0.0, cache=str(tmp_path))


def test_as_a_source_it_gives_one_text_a_sample(tmp_path: Path) -> None:
    data = open_data(data_of(tmp_path, "ruler:niah_multikey_1", 800), sequence_length=800, seed=3)
    batch = data.batch([4, 9], 0)
    again = open_data(data_of(tmp_path, "ruler:niah_multikey_1", 800), sequence_length=800, seed=3).batch([9], 5)
    assert np.array_equal(batch.tokens[1], again.tokens[0]) and not np.array_equal(batch.tokens[0], batch.tokens[1])
    assert batch.loss_mask.sum(1).tolist() == [7, 7]
    assert data.where(4)["source"] == "ruler:niah_multikey_1"


@pytest.mark.parametrize(
    ("path", "length", "kind", "says"),
    [
        ("ruler:niah_single_9", 800, "bytes", "is no task with needles: use ruler: and one of niah_single_1, niah_single_2"),
        ("ruler:niah_single_1", 300, "bytes", "does not fit into sequences of 300 bytes: use at least 470"),
        ("ruler:niah_single_1", 800, "numbers", "is a text of bytes: set data.tokenizer.kind=bytes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path, path: str, length: int, kind: str, says: str) -> None:
    with pytest.raises(DataError, match=re.escape(says)):
        open_data(data_of(tmp_path, path, length, kind), sequence_length=length, seed=1)
