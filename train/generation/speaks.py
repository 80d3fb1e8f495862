"""What makes texts, and one pass of it over tokens that follow a cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Microbatch
from model.cache import Cache
from model.hybrid import HybridModel


class Speaks(Protocol):
    """What makes texts. step, progress: of training, for the formats. vocabulary: ids the tokenizer has, of those the model has logits for."""

    @property
    def model(self) -> HybridModel: ...
    @property
    def step(self) -> int: ...
    @property
    def progress(self) -> float: ...
    @property
    def vocabulary(self) -> int: ...


@dataclass
class Untrained:
    """A model without a tokenizer, for measurements: any id may come."""

    model: HybridModel
    step: int = 0
    progress: float = 1.0

    @property
    def vocabulary(self) -> int:
        return self.model.context.config.vocab_size


def following(speaker: Speaks, tokens: Tensor, cache: Cache, texts: Sequence[int]) -> Microbatch:
    """tokens: int64 [batch, sequence], behind those of the cache. texts: the number of each sequence."""
    device = speaker.model.context.device
    sample = torch.tensor(texts, dtype=torch.int64, device=device)
    return Microbatch.following(tokens.to(device), cache, sample, step=speaker.step, progress=speaker.progress)


@torch.inference_mode()
def head(speaker: Speaks, hidden: Tensor, microbatch: Microbatch) -> Tensor:
    """hidden [sequence, batch, hidden], normed -> fp32 [sequence, batch, vocabulary]."""
    return speaker.model.lm_head(hidden, microbatch)[..., : speaker.vocabulary].float()
