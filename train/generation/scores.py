"""How likely a model finds texts that are given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import Microbatch
from model.cache import Cache
from train.generation.texts import PREFILL, Speaks


@torch.inference_mode()
def score(speaker: Speaks, texts: Sequence[Sequence[int]], part: int = PREFILL) -> list[tuple[Tensor, Tensor]]:
    """Of each text, of at least two tokens: for every token but the first the logarithm of its probability, fp32 [tokens - 1], and whether it was the
    likeliest, bool [tokens - 1], both on the host. Texts are read beside each other, in parts of so many tokens; none depends on the others.
    Of all ids of the model, as in training: of more than the tokenizer has, where its vocabulary is smaller.
    """
    device, longest = speaker.model.context.device, max(map(len, texts))
    tokens = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    tokens = tokens.to(device)
    cache, sample = Cache.empty(len(texts), device), torch.arange(len(texts), device=device)
    chances, best = [], []
    for given, wanted in zip(tokens[:, :-1].split(part, dim=1), tokens[:, 1:].split(part, dim=1), strict=True):
        microbatch = Microbatch.following(given, cache, sample, step=speaker.step, progress=speaker.progress)
        hidden = speaker.model.hidden(microbatch)
        cache.advance(given.shape[1])
        logits = speaker.model.lm_head(hidden, microbatch).float().transpose(0, 1)
        chances.append(logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1).cpu())
        best.append((logits.argmax(-1) == wanted).cpu())
    whole, likeliest = torch.cat(chances, dim=1), torch.cat(best, dim=1)
    return [(whole[row, : len(text) - 1], likeliest[row, : len(text) - 1]) for row, text in enumerate(texts)]
