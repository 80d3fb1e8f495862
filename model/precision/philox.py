"""Random bits for stochastic rounding, as a pure function of where they are used.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) turns a 128-bit counter and a 64-bit key into four random
32-bit words. There is no state: whoever knows the coordinates of an element can draw its bits, in any order, on any device, on any rank.

    key      first 8 bytes of SHA-256 of "seed/module/operand"      operand: "dy" (rows, dgrad) or "dy_t" (columns, wgrad), with "@1", "@2"
                                                                    at the depths of multi-token prediction, which may share a module
    counter  word 0   feature // 16  |  (expert + 1) << 20           global feature index; 0 in the upper bits: no expert
             word 1   position in the sequence
             word 2   global sample index, lower 32 bits
             word 3   optimizer step

No rank and no microbatch appears, so a resume, another layout or another micro batch size draws the same bits for the same element. One call
yields 16 bytes, one for each of 16 consecutive features: byte b of word w (little end first) serves feature 4 w + b of its group.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
FEATURES_PER_CALL = 16
EXPERT_SHIFT = 20


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10. counter: four int64 tensors of values in [0, 2^32), broadcastable; returns four words of the same kind."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps modulo 2^64; its bits are those of the unsigned one.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & WORD, (k1 + KEY_INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def stream_key(seed: int, module: str, operand: str) -> tuple[int, int]:
    """The 64-bit key of one operand of one module."""
    digest = hashlib.sha256(f"{seed}/{module}/{operand}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def random_bytes(
    key: tuple[int, int],
    *,
    sample: Tensor,
    position: Tensor,
    step: int,
    features: int,
    first_feature: int = 0,
    expert: Tensor | None = None,
) -> Tensor:
    """Uniform bytes, uint8 [rows, features], for the features first_feature ... first_feature + features - 1 of every row.

    sample, position: int64 [rows], the global sample and the position of each row's token. expert: int64 [rows] or None.
    """
    first, last = first_feature // FEATURES_PER_CALL, (first_feature + features - 1) // FEATURES_PER_CALL
    block = torch.arange(first, last + 1, device=sample.device)[None, :]
    if expert is not None:
        block = block | ((expert + 1)[:, None] << EXPERT_SHIFT)
    third = torch.full((1, 1), step & WORD, dtype=torch.int64, device=sample.device)
    words = philox((block, position[:, None] & WORD, sample[:, None] & WORD, third), key)
    stacked = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # [rows, blocks, 4]
    # Two's complement keeps the 32 bits; the view reads them as bytes, little end first.
    as_bytes = torch.where(stacked > 0x7FFFFFFF, stacked - (1 << 32), stacked).int().view(torch.uint8)
    skip = first_feature - first * FEATURES_PER_CALL
    return as_bytes.flatten(1)[:, skip : skip + features]


class Draws(Protocol):
    """Random bytes of an operand."""

    def bytes(self, features: int) -> Tensor:
        """uint8 [rows, features]."""
        ...


@dataclass(frozen=True)
class Given:
    """Bytes that are there already, uint8 [rows, features]."""

    values: Tensor

    def bytes(self, features: int) -> Tensor:
        return self.values


@dataclass(frozen=True)
class Stream:
    """The random bytes of one operand, given by where they are used.

    key: see `stream_key`. sample, position, expert: int64 [rows] (expert None: not routed). runs: (first global index, count) of each run of
    the operand's features where those are sharded; empty: all, from 0.
    """

    key: tuple[int, int]
    sample: Tensor
    position: Tensor
    step: int
    runs: tuple[tuple[int, int], ...] = ()
    expert: Tensor | None = None

    def bytes(self, features: int) -> Tensor:
        """uint8 [rows, features]."""
        parts = [
            random_bytes(
                self.key,
                sample=self.sample,
                position=self.position,
                step=self.step,
                features=count,
                first_feature=first,
                expert=self.expert,
            )
            for first, count in self.runs or ((0, features),)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def whole_calls(self, features: int) -> tuple[tuple[int, int], ...] | None:
        """The runs of features, where kernels can draw them 16 at a time; None where a run begins or, but for the last, ends inside a call."""
        runs = self.runs or ((0, features),)
        whole = all(first % FEATURES_PER_CALL == 0 for first, _ in runs) and all(count % FEATURES_PER_CALL == 0 for _, count in runs[:-1])
        return runs if whole else None
