"""Domains: texts of different kinds, on which a model's guesses are counted, since what can be guessed depends on what is said.

    novels, jargon, code     what a run holds out of corpus:austen, corpus:jargon and stdlib; of one it does not read, the last 5% of each document
    arithmetic, json,        generated, each window by itself, from the seed, the domain and the window's number alone
    tables, copying,
    dialogue

Everything is the same on every machine but `code`, which is the running Python's own library.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from data.config import DataConfig, SourceConfig
from data.documents import documents_of
from data.hashing import digest, mix
from data.source import splitter
from data.tokenizer import Tokenizer

HELD_OUT = 0.05  # of each document of a source the run does not read


@dataclass(frozen=True)
class Windows:
    """ids: int64 [windows, length]; sizes: int64 [windows], so many of them are text, the rest fills up."""

    ids: np.ndarray
    sizes: np.ndarray


def domain_windows(domain: str, config: DataConfig, tokenizer: Tokenizer, *, length: int, count: int, seed: int, run_seed: int) -> Windows:
    """`count` windows of `length` tokens. config, run_seed: of the run, whose held-out text is taken; seed: of generated text.

    Windows of held-out text lie evenly spread in it, and overlap where there is little of it. Raises DataError where it cannot be read.
    """
    if domain in READ:
        stream = _held_out(READ[domain], config, tokenizer, run_seed)
        starts = np.linspace(0, max(len(stream) - length, 0), count).astype(np.int64)
        rows = [stream[start : start + length] for start in starts]
    else:
        rows = [_generated(domain, digest(seed, domain, window), tokenizer, length) for window in range(count)]
    ids = np.full((count, length), tokenizer.end_of_document, dtype=np.int64)
    for row, text in zip(ids, rows, strict=True):
        row[: len(text)] = text
    return Windows(ids, np.array([len(text) for text in rows], dtype=np.int64))


def _held_out(path: str, config: DataConfig, tokenizer: Tokenizer, seed: int) -> np.ndarray:
    """The validation text of a source, each document behind an end-of-document id, int64 [tokens]."""
    end = np.array([tokenizer.end_of_document], dtype=np.int64)
    texts = tokenizer.encode_batch(_held_texts(path, config, seed))
    return np.concatenate([end, *(part for ids in texts for part in (ids.astype(np.int64), end))])


@lru_cache(maxsize=8)
def _held_texts(path: str, config: DataConfig, seed: int) -> tuple[bytes, ...]:
    """A library has thousands of files, which one evaluation after the other need not read."""
    read = any(other.path == path for phase in config.phases for other in phase.blend)
    if not read or config.validation_fraction == 0:
        config = replace(config, validation="tail", validation_fraction=HELD_OUT)
    split = splitter(config, SourceConfig(path), seed)
    return tuple(held for text in documents_of(path) if (held := split(text)[1]))


def _generated(domain: str, key: int, tokenizer: Tokenizer, length: int) -> np.ndarray:
    """At least `length` ids' worth of text, cut there, behind an end-of-document id."""
    parts, size, wanted = GENERATED[domain](_Draws(key)), 0, length
    text = ""
    while size < length:  # a token may be many bytes
        while len(text) < wanted:
            text += next(parts)
        ids = tokenizer.encode(text)
        size, wanted = 1 + len(ids), 2 * len(text)
    return np.concatenate(([tokenizer.end_of_document], ids[: length - 1])).astype(np.int64)


class _Draws:
    """Whole numbers that follow from a key."""

    def __init__(self, key: int) -> None:
        self.key, self.drawn = key, 0

    def number(self, low: int, high: int) -> int:
        """From low to high, both included."""
        self.drawn += 1
        return low + mix(self.key + self.drawn) % (high - low + 1)

    def one(self, choices: Sequence[str]) -> str:
        return choices[self.number(0, len(choices) - 1)]


NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "John", "Kate", "Louis")
PLACES = ("London", "Bath", "Paris", "Rome", "Vienna", "Berlin", "Oslo", "Madrid", "Dublin", "Prague")
THINGS = ("apple", "book", "candle", "desk", "engine", "flute", "garden", "hammer", "iron", "jacket", "kettle", "lamp", "mirror", "needle",
          "orange", "paper", "ribbon", "spoon", "table", "violin", "window", "basket", "carpet", "letter")  # fmt: skip
ADJECTIVES = ("old", "new", "small", "large", "green", "white", "heavy", "empty", "fine", "broken")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _arithmetic(draws: _Draws) -> Iterator[str]:
    while True:
        sign = draws.one("+-*")
        a, b = draws.number(0, 999), draws.number(0, 99 if sign == "*" else 999)
        yield f"{a} {sign} {b} = {a + b if sign == '+' else a - b if sign == '-' else a * b}\n"


def _json(draws: _Draws) -> Iterator[str]:
    number = draws.number(1, 900)
    while True:
        record = {
            "id": number,
            "name": draws.one(NAMES),
            "city": draws.one(PLACES),
            "items": [draws.one(THINGS) for _ in range(draws.number(1, 3))],
            "price": draws.number(100, 9999) / 100,
            "paid": bool(draws.number(0, 1)),
        }
        yield json.dumps(record, indent=2 if number % 2 else None) + "\n"
        number += 1


def _tables(draws: _Draws) -> Iterator[str]:
    while True:
        yield "| item | count | price | sum |\n| --- | --- | --- | --- |\n"
        for _ in range(draws.number(3, 8)):
            count, price = draws.number(1, 12), draws.number(1, 60)
            yield f"| {draws.one(ADJECTIVES)} {draws.one(THINGS)} | {count} | {price} | {count * price} |\n"
        yield "\n"


def _copying(draws: _Draws) -> Iterator[str]:
    while True:
        words = " ".join(draws.one(THINGS + ADJECTIVES + PLACES) for _ in range(draws.number(5, 10)))
        yield f"Text: {words}.\nCopy: {words}.\n\n"


def _dialogue(draws: _Draws) -> Iterator[str]:
    while True:
        asks, answers = draws.one(NAMES), draws.one(NAMES)
        for _ in range(draws.number(2, 4)):
            thing, day, place = f"{draws.one(ADJECTIVES)} {draws.one(THINGS)}", draws.one(DAYS), draws.one(PLACES)
            question, answer = QUESTIONS[draws.number(0, len(QUESTIONS) - 1)]
            number = draws.number(2, 40)
            for who, said in ((asks, question), (answers, answer)):
                yield f"{who}: {said.format(thing=thing, day=day, place=place, number=number)}\n"
        yield "\n"


QUESTIONS = (
    ("Where did you find the {thing}?", "I found the {thing} in {place}, on {day}."),
    ("Will you come to {place} on {day}?", "No, I cannot come on {day}. But bring me a {thing} from {place}."),
    ("How much is the {thing}?", "The {thing} is {number} pounds, and not a penny less."),
    ("Do you still have the {thing} from {place}?", "Yes, I have had the {thing} for {number} years."),
    ("Who sent you the {thing}?", "My brother in {place} sent it on {day}, with {number} others."),
    ("What shall we do on {day}?", "Let us go to {place}, and look for a {thing}."),
)

READ = {"novels": "corpus:austen", "jargon": "corpus:jargon", "code": "stdlib"}
GENERATED: dict[str, Callable[[_Draws], Iterator[str]]] = {
    "arithmetic": _arithmetic,
    "json": _json,
    "tables": _tables,
    "copying": _copying,
    "dialogue": _dialogue,
}
DOMAINS = (*READ, *GENERATED)
"""Every domain by its name."""
