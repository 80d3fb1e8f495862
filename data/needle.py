"""Needles in a haystack: sentences that name a number or a UUID for a key, hidden in a long text, and the question for one of them, in bytes.

The tasks and their wording are RULER's (Hsieh et al. 2024, arXiv 2404.06654; github.com/NVIDIA/RULER, scripts/synthetic.yaml), by its names:

    niah_single_1    one needle in five short sentences, repeated line by line
    niah_single_2    one needle in a novel                             niah_single_3    its value a UUID instead of seven digits
    niah_multikey_1  four needles in a novel, one of them asked for
    niah_multikey_2  one needle among needles, line by line            niah_multikey_3  keys and values UUIDs

What differs: a haystack is as long as makes the sequence full to the byte, its first sentence cut for that; it is of the shipped novels, not of
essays, from any word on; a key of words is two words of the novels, not an adjective and a noun. The targets are the bytes of the value alone; the
space before it is given.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.batch import Sample
from data.documents import DataError, documents_of
from data.hashing import mix, mix_range

PREFIX = "ruler:"
HELD_OUT = 20  # the last 1 / 20 of every novel is for evaluation
DEPTHS = np.linspace(0, 100, 40).round().astype(int)  # per cent
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
OPENING = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
)
QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? "
    "The special magic {kind} for {key} mentioned in the provided text is "
)
LONGEST = {"word": 19, "number": 7, "uuid": 36}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class _Kind:
    """haystack: noise, novel or needle. needles: with keys of their own."""

    haystack: str
    keys: str = "word"
    values: str = "number"
    needles: int = 1


KINDS = {
    "niah_single_1": _Kind("noise"),
    "niah_single_2": _Kind("novel"),
    "niah_single_3": _Kind("novel", values="uuid"),
    "niah_multikey_1": _Kind("novel", needles=4),
    "niah_multikey_2": _Kind("needle"),
    "niah_multikey_3": _Kind("needle", "uuid", "uuid"),
}


class Draws:
    """Numbers one after another, a function of 64 bits."""

    def __init__(self, key: int):
        self.key, self.count = key, 0

    def below(self, size: int) -> int:
        self.count += 1
        return mix(self.key + self.count) % size

    def some(self, count: int, size: int) -> list[int]:
        """Different ones of 0 ... size - 1, in order."""
        return sorted(np.argsort(mix_range(mix(self.key + self.below(1 << 32)), size), kind="stable")[:count].tolist())

    def number(self) -> str:
        return str(10**6 + self.below(9 * 10**6))

    def word(self) -> str:
        words = novels().words
        return f"{words[self.below(len(words))]}-{words[self.below(len(words))]}"

    def uuid(self) -> str:
        """Of version 4, random."""
        digits = f"{self.below(1 << 60):015x}{self.below(1 << 60):015x}"
        return f"{digits[:8]}-{digits[8:12]}-4{digits[12:15]}-{'89ab'[self.below(4)]}{digits[15:18]}-{digits[18:30]}"


@dataclass(frozen=True)
class Novels:
    """train, held: text in one line; words: for keys."""

    train: str
    held: str
    words: list[str]


@lru_cache(maxsize=1)
def novels() -> Novels:
    """The shipped ones, without what is no ASCII."""
    texts = [" ".join(text.decode("ascii", "ignore").split()) for text in documents_of("corpus:austen")]
    cuts = [len(text) - len(text) // HELD_OUT for text in texts]
    words = sorted({word for text in texts for word in re.findall(r"\b[a-z]{4,9}\b", text)})
    pairs = list(zip(texts, cuts, strict=True))
    return Novels(" ".join(text[:cut] for text, cut in pairs), " ".join(text[cut:] for text, cut in pairs), words)


@dataclass(frozen=True)
class Needles:
    """The task of this name. held: novels' text is of the part that is for evaluation."""

    name: str
    held: bool = False

    length = None

    @classmethod
    def of(cls, path: str, *, held: bool = False) -> "Needles":
        """From `ruler:NAME`. Raises DataError for a name that is none."""
        name = path.removeprefix(PREFIX)
        if name not in KINDS:
            raise DataError(f"data source {path!r} is no task with needles: use {PREFIX} and one of {', '.join(KINDS)}")
        return cls(name, held)

    def draw(self, key: int, length: int) -> Sample:
        """A sequence of `length` bytes as ids. Raises DataError where the longest keys would leave it no room for a haystack."""
        if length < self.shortest:
            raise DataError(f"{PREFIX}{self.name} does not fit into sequences of {length} bytes: use at least {self.shortest}")
        text, answer = self.text(key, length + 1)
        ids = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64)
        counts = np.arange(length) >= length - len(answer)
        return Sample(ids[:-1].copy(), ids[1:].copy(), counts, np.zeros(length, dtype=np.int32))

    @property
    def shortest(self) -> int:
        """Bytes of a sequence with the longest keys and five short sentences of haystack."""
        kind = KINDS[self.name]
        key, value = LONGEST[kind.keys] * "x", LONGEST[kind.values] * "x"
        parts = [part.format(kind=kind.values, key=key, value=value) for part in (OPENING, QUESTION, *[NEEDLE + " "] * kind.needles)]
        return sum(map(len, parts)) + len(value) + len(NOISE)

    def text(self, key: int, size: int) -> tuple[str, str]:
        """`size` characters that end with the answer, and the answer."""
        kind, draws = KINDS[self.name], Draws(key)
        make: dict[str, Callable[[], str]] = {"word": draws.word, "number": draws.number, "uuid": draws.uuid}
        pairs = [(make[kind.keys](), make[kind.values]()) for _ in range(kind.needles)]
        asked, answer = pairs[draws.below(len(pairs))]
        opening, question = OPENING.format(kind=kind.values), QUESTION.format(kind=kind.values, key=asked)
        needles = [NEEDLE.format(kind=kind.values, key=name, value=value) for name, value in pairs]
        room = size - len(opening) - len(question) - len(answer) - sum(len(needle) + 1 for needle in needles)
        if kind.haystack == "novel":
            context = self._in_novel(draws, needles, room)
        else:
            lines = [NOISE] * (room // len(NOISE) + 1)
            if kind.haystack == "needle":
                shortest = len(NEEDLE)
                lines = [
                    NEEDLE.format(kind=kind.values, key=make[kind.keys](), value=make[kind.values]()) for _ in range(room // shortest + 2)
                ]
            lines = "\n".join(lines)[-room:].split("\n")
            for place, needle in zip(reversed(draws.some(len(needles), len(lines))), needles, strict=True):
                lines.insert(place, needle)
            context = "\n".join(lines)
        return opening + context + question + answer, answer

    def _in_novel(self, draws: Draws, needles: list[str], room: int) -> str:
        text = novels().held if self.held else novels().train
        if room + 100 > len(text):
            raise DataError(
                f"{PREFIX}{self.name} has novels of {len(text):,} bytes, too few for a haystack of {room:,}: shorten the sequence"
            )
        start = text.index(" ", draws.below(len(text) - room - 99)) + 1
        sentences = re.split(r"(?<=[.!?]) ", text[start : start + room])
        depths = [int(len(sentences) * DEPTHS[depth] / 100) for depth in draws.some(len(needles), len(DEPTHS))]
        for place, needle in zip(reversed(depths), needles, strict=True):
            sentences.insert(place, needle)
        return " ".join(sentences)
