"""Which token comes next, given its logits.

A draw depends on nothing but the seed, the number of the text and the place in it (Philox, counted): the same text comes whatever else is in the
batch, and a token may be drawn again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature: divides the logits; 0: the likeliest token, always. top_p: of the likeliest tokens, as few as have this probability together."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (the likeliest token) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed={self.seed} must be from 0 to 2^64 - 1")

    def choose(self, logits: Tensor, texts: Sequence[int], places: Sequence[int]) -> Tensor:
        """logits fp32 [batch, vocabulary] -> int64 [batch]. texts, places: of each row, for its draw."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # In fp64 on the host, so that every device chooses the same.
        chances = (logits.double().cpu() / self.temperature).softmax(-1)
        chances, order = chances.sort(stable=True, dim=-1, descending=True)
        total = chances.cumsum(-1)
        chances = chances.masked_fill(total - chances >= self.top_p, 0.0)
        total = chances.cumsum(-1)
        draws = torch.tensor([self._draw(text, place) for text, place in zip(texts, places, strict=True)], dtype=torch.float64)
        rank = (total <= (draws * total[:, -1]).unsqueeze(-1)).sum(-1)
        return order.gather(-1, rank.clamp(max=order.shape[-1] - 1).unsqueeze(-1)).squeeze(-1).to(logits.device)

    def _draw(self, text: int, place: int) -> float:
        """From 0 to below 1."""
        return float(np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, text, place])).random())
