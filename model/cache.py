"""What layers keep of the tokens they have seen, so that the next one can be computed without them.

    Mamba        the last rows the convolution sees, and the state, both of one size however long the text is
    attention    keys and values of every token

A cache is of one model and a batch of sequences, which may be of unequal length. It travels in the microbatch, so that a layer that needs nothing
of the past does not know of it.

Tokens of the last pass can be taken back (`Cache.accept`), for they may have been guesses. Keys and values need nothing for that: what lies behind
a sequence's length is masked, and written over. A state cannot be computed backwards, so of a `revocable` cache every token's is kept until it is
known which one holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn

ROOM = 64  # attention sees so many keys, or a multiple


class Remembered(Protocol):
    """A layer's part of a cache."""

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> Any:
        """That of several batches as of one."""

    def accept(self, counts: Sequence[int]) -> None:
        """Of the tokens of the last pass only the first so many of each sequence have been seen."""


@dataclass
class MambaState:
    """rows: fp32 or bf16 [width - 1, batch, channels], what the convolution saw last, zeros before the text. state: fp32
    [batch, groups, state size, heads of a group, head dim]; None before the first token. passed: the states before and behind every token of the
    last pass, where they are kept, and passed_rows, [width - 1 + tokens, batch, channels], all that the convolution saw in it."""

    rows: Tensor
    state: Tensor | None = None
    passed: list[Tensor] = field(default_factory=list)
    passed_rows: Tensor | None = None

    def entering(self, added: Tensor, kept: Tensor) -> Tensor:
        """As a scan over what came before: the state these tokens find, which becomes the one they leave. added: what they leave of
        themselves; kept: the part that is left of what they found."""
        found = torch.zeros_like(added) if self.state is None else self.state
        self.state = added + kept * found
        return found

    def returning(self, added: Tensor, kept: Tensor) -> Tensor:
        raise RuntimeError("a cache has no gradient")

    def shift(self, rows: Tensor) -> Tensor:
        """The rows before these, which become the last ones seen."""
        before = self.rows
        self.passed_rows = torch.cat((before, rows))
        self.rows = self.passed_rows[len(rows) :]
        return before

    def leave(self, states: list[Tensor]) -> None:
        """states: before these tokens, and behind each of them."""
        self.passed, self.state = states, states[-1]

    def accept(self, counts: Sequence[int]) -> None:
        assert self.passed_rows is not None, "there was no pass"
        rows, width = self.passed_rows, len(self.rows)
        if any(count != len(rows) - width for count in counts):
            assert self.passed, "what a token left has not been kept"
            if len(set(counts)) == 1:
                self.state, self.rows = self.passed[counts[0]], rows[counts[0] : counts[0] + width]
            else:
                self.state = torch.stack([self.passed[count][number] for number, count in enumerate(counts)])
                self.rows = torch.stack([rows[count : count + width, number] for number, count in enumerate(counts)], dim=1)
        self.passed, self.passed_rows = [], None

    @classmethod
    def joined(cls, parts: Sequence["MambaState"]) -> "MambaState":
        states = [part.state for part in parts if part.state is not None]
        return cls(torch.cat([part.rows for part in parts], dim=1), torch.cat(states) if states else None)


@dataclass
class KeysValues:
    """keys, values: [batch, room, kv_heads, head dim], the first `lengths` of the cache are those of tokens; room grows by doubling."""

    keys: Tensor
    values: Tensor

    def add(self, key: Tensor, value: Tensor, places: Tensor) -> None:
        """key, value: [sequence, batch, kv_heads, head dim]; places: int64 [batch, sequence], where each token belongs."""
        needed = int(places.max()) + 1
        if needed > self.keys.shape[1]:
            room = -(-max(needed, 2 * self.keys.shape[1]) // ROOM) * ROOM - self.keys.shape[1]
            self.keys, self.values = (nn.functional.pad(held, (0, 0, 0, 0, 0, room)) for held in (self.keys, self.values))
        sequences = torch.arange(len(places), device=places.device)[:, None]
        self.keys[sequences, places] = key.transpose(0, 1)
        self.values[sequences, places] = value.transpose(0, 1)

    def accept(self, counts: Sequence[int]) -> None:
        """The cache's lengths say it."""

    @classmethod
    def joined(cls, parts: Sequence["KeysValues"]) -> "KeysValues":
        room = max(part.keys.shape[1] for part in parts)
        held = [[nn.functional.pad(each, (0, 0, 0, 0, 0, room - each.shape[1])) for each in (part.keys, part.values)] for part in parts]
        return cls(torch.cat([keys for keys, _ in held]), torch.cat([values for _, values in held]))


R = TypeVar("R", bound=Remembered)


class Cache:
    """lengths: int64 [batch], tokens of each sequence that every layer has seen; `advance` and `accept` say that there are more.

    revocable: tokens come one by one, or a few of which some may be taken back; what each of them leaves is kept, and a CPU multiplies them row by
    row. singly: besides, all else that a CPU does with a token is done as if it came alone, so that no last bit depends on how many come with it.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.revocable = self.singly = False
        self._layers: dict[nn.Module, Any] = {}

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Self:
        return cls(torch.zeros(batch, dtype=torch.int64, device=device))

    @classmethod
    def joined(cls, caches: Sequence[Self]) -> Self:
        """That of several batches of one model as of one, in this order."""
        cache = cls(torch.cat([each.lengths for each in caches]))
        for layer, first in caches[0]._layers.items():
            cache._layers[layer] = type(first).joined([each._layers[layer] for each in caches])
        return cache

    def of(self, layer: nn.Module, make: Callable[[], R]) -> R:
        """The layer's part; `make` gives that of before the first token."""
        if layer not in self._layers:
            self._layers[layer] = make()
        return cast(R, self._layers[layer])

    def advance(self, tokens: int) -> None:
        """So many more of every sequence, all tokens of the last pass."""
        self.accept([tokens] * len(self.lengths))

    def accept(self, counts: Sequence[int]) -> None:
        """So many more of each sequence, of the tokens of the last pass."""
        for part in self._layers.values():
            part.accept(counts)
        self.lengths = self.lengths + torch.tensor(counts, device=self.lengths.device)

    def bytes(self) -> int:
        """Held by all layers."""
        held = (value for part in self._layers.values() for value in vars(part).values())
        return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))
