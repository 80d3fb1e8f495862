"""How many drafts were accepted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Acceptance:
    """rounds: int64 [texts, 1 + depth], of each text, in which exactly 0, 1, ... drafts were accepted."""

    rounds: Tensor

    @classmethod
    def none(cls, texts: int, depth: int) -> "Acceptance":
        return cls(torch.zeros(texts, 1 + depth, dtype=torch.int64))

    def add(self, accepted: Sequence[int], over: Sequence[bool]) -> None:
        """A round of every text. over: of those that had ended before."""
        for text, (count, done) in enumerate(zip(accepted, over, strict=True)):
            self.rounds[text, count] += not done

    @property
    def depth(self) -> int:
        return self.rounds.shape[1] - 1

    def length(self) -> float:
        """Mean accepted length: tokens a pass of the model gives, from 1 to 1 + depth; nan without a round."""
        rounds = self.rounds.sum(0).double()
        return float((rounds * torch.arange(1, len(rounds) + 1)).sum() / rounds.sum())

    def by_depth(self) -> list[float]:
        """Of the drafts of each depth before which all were accepted, the part that was too; nan where there was none."""
        reached = self.rounds.sum(0).double().flip(0).cumsum(0).flip(0)  # rounds with so many accepted drafts or more
        return [float(share) for share in reached[1:] / reached[:-1]]

    def __str__(self) -> str:
        shares = [f"{share:.0%} of depth {depth}" for depth, share in enumerate(self.by_depth(), start=1) if share == share]
        what = f"; of the drafts before which all were right, accepted: {', '.join(shares)}" if shares else ""
        return f"{self.length():.2f} tokens a pass with {self.depth} drafts{what}"
