"""Texts made by a model, many at once.

Every prompt is read by itself, in parts, into a cache of its own; then the caches are joined, and all texts grow together, each at its own length.

In a round the model is given, of every text, the token chosen last and some drafts of those behind it (`train.generation.drafter`; none: one token
after another), all in one pass. That gives its own choice for every place. As long as a draft is what was chosen for its place, the choice behind it
is good too; the first that is not, and all after it, are taken back from the cache. Drafts so change nothing but the number of passes: a place's
choice depends on the tokens before it and the draw of the place alone.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.cache import Cache
from train.generation.acceptance import Acceptance
from train.generation.drafter import Drafter
from train.generation.sampling import Sampling
from train.generation.speaks import Speaks, following, head

PREFILL = 512  # tokens of a prompt at a time: its [part, prompt] mask of attention stays small


@torch.inference_mode()
def read(speaker: Speaks, prompt: Sequence[int], text: int, *, part: int = PREFILL, drafter: Drafter | None = None) -> tuple[Tensor, Cache]:
    """What the head is given behind a prompt of at least one token, [1, 1, hidden], and its cache. drafter: reads it too, but for the last place."""
    cache = Cache.empty(1, speaker.model.context.device)
    tokens = torch.tensor([prompt], dtype=torch.int64, device=speaker.model.context.device)
    for some in tokens.split(part, dim=1):
        hidden = speaker.model.hidden(following(speaker, some, cache, [text]))
        cache.advance(some.shape[1])
        followed = hidden[:-1] if int(cache.lengths) == len(prompt) else hidden
        if drafter is not None and len(followed):
            drafter.read(followed, tokens)
    return hidden[-1:], cache


@torch.inference_mode()
def generate(
    speaker: Speaks,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling,
    *,
    end: int | None = None,
    depth: int = 0,
    acceptance: Acceptance | None = None,
) -> Iterator[list[int | None]]:
    """Tokens of every text in turn, at most `tokens` of each; None of those that have ended, or for which there is none this time. prompts: of at
    least one token each. end: the token that ends a text, and belongs to it. depth: drafts a round; acceptance: counts them.
    """
    speaker.model.eval()
    texts, device = range(len(prompts)), speaker.model.context.device
    ids = torch.zeros(len(prompts), max(map(len, prompts)) + tokens + depth + 1, dtype=torch.int64, device=device)
    for text, prompt in enumerate(prompts):
        ids[text, : len(prompt)] = torch.tensor(prompt)
    drafters = [Drafter.of(speaker, depth, text) if depth else None for text in texts]
    begun = [read(speaker, prompt, text, drafter=drafter) for text, prompt, drafter in zip(texts, prompts, drafters, strict=True)]
    hidden, cache = torch.cat([state for state, _ in begun], dim=1), Cache.joined([held for _, held in begun])
    drafter = Drafter.joined([each for each in drafters if each is not None]) if depth else None
    del begun, drafters
    cache.revocable = cache.singly = True
    known, over = [len(prompt) for prompt in prompts], [False for _ in texts]
    first = True
    while True:
        places = torch.tensor(known, device=device)[:, None] + torch.arange(len(hidden), device=device)  # of which something is chosen now
        chosen = _chosen(speaker, hidden, cache, sampling, texts, places)
        drafts = ids.gather(1, places)[:, :-1]
        right = (chosen[:, :-1] == drafts).long().cumprod(1).sum(1).tolist()
        fresh = [0 if done else count + 1 for count, done in zip(right, over, strict=True)]
        if not first:
            cache.accept(fresh)
            if acceptance is not None:
                acceptance.add(right, over)
        ids.scatter_(1, places, chosen)
        new = [row[:count] for row, count in zip(chosen.tolist(), fresh, strict=True)]
        for text, row in enumerate(new):
            if end in row:
                del row[row.index(end) + 1 :]
            del row[len(prompts[text]) + tokens - known[text] :]
            known[text] += len(row)
            over[text] = over[text] or end in row or known[text] == len(prompts[text]) + tokens
        for turn in range(max(map(len, new))):
            yield [row[turn] if turn < len(row) else None for row in new]
        if all(over):
            return
        if drafter is not None:
            drafter.draft(hidden, [0 if done else count for count, done in zip(fresh, over, strict=True)], ids, sampling)
        fed = ids.gather(1, torch.tensor(known, device=device)[:, None] - 1 + torch.arange(1 + depth, device=device))
        hidden, first = speaker.model.hidden(following(speaker, fed, cache, texts)), False


def _chosen(speaker: Speaks, hidden: Tensor, cache: Cache, sampling: Sampling, texts: Sequence[int], places: Tensor) -> Tensor:
    """int64 [batch, sequence], behind hidden [sequence, batch, hidden]. places: of its shape, where what is chosen will stand."""
    logits = head(speaker, hidden, following(speaker, places, cache, texts)).transpose(0, 1)
    numbers = [text for text in texts for _ in range(len(hidden))]
    return sampling.choose(logits.flatten(0, 1), numbers, places.flatten().tolist()).view(places.shape)
