"""Texts made by a model, many at once, token after token.

Every prompt is read by itself, in parts, into a cache of its own; then the caches are joined, and all texts grow together, each at its own length.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Microbatch
from model.cache import Cache
from model.hybrid import HybridModel
from train.generation.sampling import Sampling

PREFILL = 512  # tokens of a prompt at a time: its [part, prompt] mask of attention stays small


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


@torch.inference_mode()
def next_logits(speaker: Speaks, tokens: Tensor, cache: Cache, texts: Sequence[int]) -> Tensor:
    """fp32 [batch, vocabulary] behind these tokens, int64 [batch, sequence], which the cache now holds. texts: the number of each sequence."""
    device = speaker.model.context.device
    sample = torch.tensor(texts, dtype=torch.int64, device=device)
    microbatch = Microbatch.following(tokens.to(device), cache, sample, step=speaker.step, progress=speaker.progress)
    hidden = speaker.model.hidden(microbatch)
    cache.advance(tokens.shape[1])
    return speaker.model.lm_head(hidden[-1:], microbatch)[0, :, : speaker.vocabulary].float()


def read(speaker: Speaks, prompt: Sequence[int], text: int, part: int = PREFILL) -> tuple[Tensor, Cache]:
    """The logits behind a prompt of at least one token, [1, vocabulary], and its cache."""
    cache = Cache.empty(1, speaker.model.context.device)
    tokens = torch.tensor([prompt], dtype=torch.int64)
    for some in tokens.split(part, dim=1):
        logits = next_logits(speaker, some, cache, [text])
    return logits, cache


def generate(
    speaker: Speaks, prompts: Sequence[Sequence[int]], tokens: int, sampling: Sampling, *, end: int | None = None
) -> Iterator[list[int | None]]:
    """The next token of every text, `tokens` times; None of those that have ended, and no more once all have. prompts: of at least one token each.
    end: the token that ends a text, and belongs to it.
    """
    speaker.model.eval()
    texts = range(len(prompts))
    first = [read(speaker, prompt, text) for text, prompt in enumerate(prompts)]
    logits, cache = torch.cat([behind for behind, _ in first]), Cache.joined([held for _, held in first])
    del first
    over = [False] * len(prompts)
    for count in range(tokens):
        chosen = sampling.choose(logits, texts, [len(prompt) + count for prompt in prompts])
        ids = chosen.tolist()
        yield [None if done else token for token, done in zip(ids, over, strict=True)]
        over = [done or token == end for token, done in zip(ids, over, strict=True)]
        if all(over) or count == tokens - 1:
            return
        logits = next_logits(speaker, chosen.unsqueeze(1), cache, texts)
