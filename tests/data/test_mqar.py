"""The task of recall against its definition, by formulas of its own, and against numbers recorded from its authors' code."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import DataConfig, PhaseConfig, SourceConfig, TokenizerConfig
from data.documents import DataError
from data.hashing import digest
from data.mqar import MQAR
from data.text_data import TextData, open_data
from data.tokenizer import FileTokenizer, NumberTokenizer

VOCABULARY = 8192
# Of HazyResearch/zoology at commit d88d6f5, multiquery_ar(vocab_size=8192, seed=0, power_a=0.01, random_non_queries=True), run once: examples;
# mean place, counted from 0, of all queries, of the first key's and of the last key's; how often some query has place 0, place 1, the last place.
RECORDED = {
    (64, 4): (20000, 7.1374, 6.1406, 8.1123, 0.7212, 0.4741, 0.0437),
    (128, 8): (5000, 14.1240, 11.1296, 16.9158, 0.8950, 0.6948, 0.0364),
    (256, 16): (2000, 28.2417, 21.4525, 34.4380, 0.9800, 0.8870, 0.0395),
    (512, 64): (800, 61.2645, 33.3650, 78.4988, 1.0000, 1.0000, 0.1350),
}


def places_of(task: MQAR, count: int) -> np.ndarray:
    """[count, pairs]: the place of each key's query, found from the tokens by the rules alone, which are checked on the way."""
    context, found = 2 * task.pairs, np.empty((count, task.pairs), dtype=np.int64)
    for index in range(count):
        drawn = task.draw(digest("test", index), task.length)
        keys, values = drawn.tokens[0:context:2], drawn.tokens[1:context:2]
        queries = np.flatnonzero(drawn.counts)
        answer = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert len(answer) == len(set(values.tolist())) == task.pairs == len(queries)
        assert keys.min() >= 1 and keys.max() < VOCABULARY // 2 <= values.min() and values.max() < VOCABULARY
        assert queries.min() >= context and (queries % 2 == 0).all()
        asked = drawn.tokens[queries]
        assert sorted(asked.tolist()) == sorted(keys.tolist()), "each key is asked once"
        assert drawn.labels[queries].tolist() == [answer[key] for key in asked.tolist()]
        order = [int(np.flatnonzero(asked == key)[0]) for key in keys]
        found[index] = (queries[order] - context) // 2
    return found


@pytest.mark.parametrize(("length", "pairs"), RECORDED)
def test_queries_lie_where_the_authors_code_puts_them(length: int, pairs: int) -> None:
    count = min(4000, 200_000 // length // 2)
    places = places_of(MQAR(length, pairs, VOCABULARY), count)
    examples, mean, first, last, zero, one, end = RECORDED[length, pairs]
    errors = 4 * np.sqrt(1 / count + 1 / examples)  # four standard errors of a difference
    spread = (length - 2 * pairs) / 2 / 2  # no distribution over the places has a larger standard deviation
    assert abs(places[:, 0].mean() - first) < errors * places[:, 0].std()
    assert abs(places[:, -1].mean() - last) < errors * places[:, -1].std()
    assert abs(places.mean() - mean) < errors * min(spread, places.mean(1).std())
    for place, share in ((0, zero), (1, one), ((length - 2 * pairs) // 2 - 1, end)):
        assert abs((places == place).any(1).mean() - share) < errors * np.sqrt(share * (1 - share)) + 1e-9


def test_places_follow_the_power_law_without_replacement() -> None:
    """The first key's place has the weights themselves as its distribution, the second key's what is left of them: by formula, chi-square."""
    task, count = MQAR(64, 4, VOCABULARY), 4000
    weights = np.arange(1, 29) ** (0.01 - 1.0)
    p = weights / weights.sum()
    second = np.array([sum(p[i] * p[j] / (1 - p[i]) for i in range(28) if i != j) for j in range(28)])
    uniform = np.full(28, 1 / 28)
    places = places_of(task, count)
    for column, expected in ((0, p), (1, second)):
        seen = np.bincount(places[:, column], minlength=28)
        assert _chi_square(seen, expected) < 65  # 27 degrees of freedom: exceeded once in 15,000 times
        assert _chi_square(seen, uniform) > 1000


def _chi_square(seen: np.ndarray, expected: np.ndarray) -> float:
    wanted = expected * seen.sum()
    return float(((seen - wanted) ** 2 / wanted).sum())


def test_all_else_is_any_id_and_keys_and_values_are_uniform() -> None:
    task = MQAR(128, 8, VOCABULARY)
    drawn = [task.draw(digest("filler", index), 128) for index in range(1500)]
    tokens, counts = np.stack([each.tokens for each in drawn]), np.stack([each.counts for each in drawn])
    filler = tokens[:, 16:][~counts[:, 16:]]
    for ids, low, high in (
        (filler, 0, VOCABULARY),
        (tokens[:, 0:16:2], 1, VOCABULARY // 2),
        (tokens[:, 1:16:2], VOCABULARY // 2, VOCABULARY),
    ):
        seen = np.histogram(ids, bins=16, range=(low, high))[0]
        assert _chi_square(seen, np.full(16, 1 / 16)) < 45  # 15 degrees of freedom: once in 13,000 times


def data_of(tmp_path: Path, *paths: str, length: int = 256, seed: int = 1, reset: bool = True, vocabulary: int = VOCABULARY) -> TextData:
    config = DataConfig(
        (PhaseConfig(tuple(SourceConfig(path) for path in paths)),),
        TokenizerConfig("numbers", vocab_size=vocabulary),
        validation_fraction=0.0,
        reset_at_document=reset,
        cache=str(tmp_path),
    )
    config.validate()
    return open_data(config, sequence_length=length, seed=seed)


def test_a_sample_holds_whole_sequences_and_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    data = data_of(tmp_path, "mqar:64x4", "mqar:128x8")
    whole = data.batch(range(64), 0)
    fresh = data_of(tmp_path, "mqar:64x4", "mqar:128x8").batch([63, 5], 7)
    for name in ("tokens", "labels", "loss_mask", "documents"):
        assert torch.equal(getattr(fresh, name), getattr(whole, name)[[63, 5]]), name
    assert not torch.equal(data_of(tmp_path, "mqar:64x4", seed=2).batch([0], 0).tokens, data_of(tmp_path, "mqar:64x4").batch([0], 0).tokens)
    queries = whole.loss_mask.sum(1)
    assert (queries == 16).all() and whole.reset
    kinds = whole.documents.max(1).values + 1
    assert sorted(set(kinds.tolist())) == [2, 4] and 28 <= (kinds == 4).sum() <= 36
    assert len({tuple(row) for row in whole.tokens.tolist()}) == 64, "no sequence comes twice"
    one = whole.tokens[kinds == 4][0]
    assert all(one[start] < 4096 <= one[start + 1] for start in (0, 64, 128, 192)), "each sequence begins with its pairs"


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ("mqar:64", {}, "write its length and its pairs, for instance mqar:64x4"),
        ("mqar:64x17", {}, "cannot hold 17 pairs and as many queries"),
        ("mqar:63x4", {}, "an even length"),
        ("mqar:64x4", {"length": 96}, "train.sequence_length=96 is not a multiple: set it to 64"),
        ("mqar:64x4", {"reset": False}, "data.reset_at_document=false would mix: set it to true"),
        ("mqar:64x4", {"vocabulary": 64}, "needs more ids than the 64 there are"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path, path: str, options: dict[str, int], says: str) -> None:
    with pytest.raises(DataError, match=re.escape(says)):
        data_of(tmp_path, path, **options)  # type: ignore[arg-type]


def test_numbers_are_their_own_text(tmp_path: Path) -> None:
    tokenizer = NumberTokenizer(300)
    ids = [299, 0, 17, 4]
    assert tokenizer.encode("299 0 17 4").tolist() == ids and tokenizer.decode(ids[2:]) == "17 4" and tokenizer.vocab_size == 300
    tokenizer.save(tmp_path)
    stored = FileTokenizer(tmp_path / "tokenizer.json", "0")
    assert stored.encode("299 0 17 4").tolist() == ids and stored.end_of_document == tokenizer.end_of_document == 0
    with pytest.raises(DataError, match="cannot encode"):
        tokenizer.encode("300")
