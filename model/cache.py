"""What layers keep of the tokens they have seen, so that the next one can be computed without them.

    Mamba        the last rows the convolution sees, and the state, both of one size however long the text is
    attention    keys and values of every token

A cache is of one model and a batch of sequences, which may be of unequal length. It travels in the microbatch, so that a layer that needs nothing
of the past does not know of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn


class Remembered(Protocol):
    """A layer's part of a cache."""

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> Any:
        """That of several batches as of one."""


@dataclass
class MambaState:
    """rows: fp32 or bf16 [width - 1, batch, channels], what the convolution saw last, zeros before the text. state: fp32
    [batch, groups, state size, heads of a group, head dim]; None before the first token."""

    rows: Tensor
    state: Tensor | None = None

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
        if len(before):
            self.rows = torch.cat((before, rows))[-len(before) :]
        return before

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
            room = max(needed, 2 * self.keys.shape[1]) - self.keys.shape[1]
            self.keys, self.values = (nn.functional.pad(held, (0, 0, 0, 0, 0, room)) for held in (self.keys, self.values))
        sequences = torch.arange(len(places), device=places.device)[:, None]
        self.keys[sequences, places] = key.transpose(0, 1)
        self.values[sequences, places] = value.transpose(0, 1)

    @classmethod
    def joined(cls, parts: Sequence["KeysValues"]) -> "KeysValues":
        room = max(part.keys.shape[1] for part in parts)
        held = [[nn.functional.pad(each, (0, 0, 0, 0, 0, room - each.shape[1])) for each in (part.keys, part.values)] for part in parts]
        return cls(torch.cat([keys for keys, _ in held]), torch.cat([values for _, values in held]))


R = TypeVar("R", bound=Remembered)


class Cache:
    """lengths: int64 [batch], tokens of each sequence that every layer has seen; `advance` says that there are more."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
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
        """So many more of every sequence."""
        self.lengths = self.lengths + tokens

    def bytes(self) -> int:
        """Held by all layers."""
        held = (value for part in self._layers.values() for value in vars(part).values())
        return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))
