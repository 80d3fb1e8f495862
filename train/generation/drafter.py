"""Drafts of the next tokens, by the model's own multi-token prediction.

With h_s what the stack gave for token x_s, depth k at place s is given x_{s+k} and the hidden state of depth k - 1 there, and guesses x_{s+k+1},
as in training (`model.mtp`). Once x_{p+1} is chosen, the depths, one after another at place p, draft x_{p+2}, x_{p+3}, ...; each is given the draft
of the one before.

A depth may look back (it has attention, or a state), so each has a cache of its own, also where all are one block: its entry of place s is that of
x_{s+k}. What depth k saw at the last k - 1 places came from drafts; when the next tokens are certain, these entries are made again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import Cache
from train.generation.sampling import Sampling
from train.generation.speaks import Speaks, following, head


@dataclass
class Drafter:
    """Of a batch of texts. texts: the number of each. caches: of each depth. last: of each depth, [1, batch, hidden], what it gave at the last
    place it need not see again. seen: places of each text that `read` and `draft` were given."""

    speaker: Speaks
    texts: Sequence[int]
    caches: list[Cache]
    last: list[Tensor]
    seen: list[int]

    @classmethod
    def of(cls, speaker: Speaks, depth: int, text: int) -> "Drafter":
        """For one text, before its first token. Raises ValueError for a depth that the model cannot draft."""
        config, device = speaker.model.context.config, speaker.model.context.device
        check_depth(speaker, depth)
        nothing = torch.zeros(1, 1, config.hidden_size, dtype=speaker.model.norm_f.weight.dtype, device=device)
        drafter = cls(speaker, [text], [Cache.empty(1, device) for _ in range(depth)], [nothing] * depth, [0])
        for number, cache in enumerate(drafter.caches, start=1):  # a pass that is taken back, so that every layer has its part
            cache.revocable = True
            drafter._pass(number, nothing, [0], torch.zeros(1, 1, dtype=torch.int64, device=device), 1)
            cache.accept([0])
            cache.revocable = False
        return drafter

    @classmethod
    def joined(cls, drafters: Sequence["Drafter"]) -> "Drafter":
        """Those of several texts as one."""
        caches = [Cache.joined(of_depth) for of_depth in zip(*(each.caches for each in drafters), strict=True)]
        for cache in caches:
            cache.revocable = True
        last = [torch.cat(of_depth, dim=1) for of_depth in zip(*(each.last for each in drafters), strict=True)]
        texts = [text for each in drafters for text in each.texts]
        return cls(drafters[0].speaker, texts, caches, last, [seen for each in drafters for seen in each.seen])

    def read(self, hidden: Tensor, ids: Tensor) -> None:
        """More of a single text. hidden: [sequence, 1, hidden], what the stack gave for it; ids: int64 [1, room], the text, with the token behind."""
        seen = [self.seen[0] + len(hidden)]
        given, start = hidden, self.seen
        for depth, cache in enumerate(self.caches, start=1):
            first, sure = _sure(self.seen, depth), _sure(seen, depth)
            if sure == first:
                break
            out = self._pass(depth, given, start, ids, sure[0] - first[0])
            cache.advance(len(out))
            given, start = torch.cat((self.last[depth - 1], out)), [first[0] - 1]
            self.last[depth - 1] = out[-1:]
        self.seen = seen

    def draft(self, hidden: Tensor, fresh: Sequence[int], ids: Tensor, sampling: Sampling) -> None:
        """hidden: [sequence, batch, hidden], what the stack gave for the tokens after those seen; of each text the first `fresh` count. ids: int64
        [batch, room], the texts, with the token behind those; the drafts are written behind it, and chosen by the draws of their places."""
        seen = [before + more for before, more in zip(self.seen, fresh, strict=True)]
        batch = torch.arange(len(seen), device=hidden.device)
        given, start = hidden, self.seen
        for depth, cache in enumerate(self.caches, start=1):
            first, sure = _sure(self.seen, depth), _sure(seen, depth)
            out = self._pass(depth, given, start, ids, max(end - begin for end, begin in zip(seen, first, strict=True)))
            places = [place + depth for place in seen]
            logits = head(self.speaker, _before(seen, first, out), following(self.speaker, ids[:, :1], cache, self.texts))[0]
            ids[batch, torch.tensor(places, device=ids.device)] = sampling.choose(logits, self.texts, places)
            cache.accept([after - before for after, before in zip(sure, first, strict=True)])
            given, start = torch.cat((self.last[depth - 1], out)), [begin - 1 for begin in first]
            self.last[depth - 1] = _before(sure, first, out)
        self.seen = seen

    def _pass(self, depth: int, given: Tensor, start: Sequence[int], ids: Tensor, count: int) -> Tensor:
        """`count` more places of a depth, [count, batch, hidden]. given: what the depth before gave, from place `start` on."""
        cache = self.caches[depth - 1]
        more = torch.arange(count, device=ids.device)
        tokens = ids.gather(1, (cache.lengths[:, None] + depth + more).clamp(max=ids.shape[1] - 1))
        rows = (cache.lengths - torch.tensor(start, device=ids.device) + more[:, None]).clamp(max=len(given) - 1)
        hidden = given[rows, torch.arange(given.shape[1], device=ids.device)]
        return self.speaker.model.deeper(hidden, tokens, following(self.speaker, tokens, cache, self.texts), depth)


def _sure(seen: Sequence[int], depth: int) -> list[int]:
    """Entries of a depth that no draft went into."""
    return [max(0, places + 1 - depth) for places in seen]


def _before(places: Sequence[int], first: Sequence[int], out: Tensor) -> Tensor:
    """Of `out`, [count, batch, hidden] from place `first` on, what belongs to the place before: [1, batch, hidden]; anything where there is none."""
    rows = [max(0, place - 1 - begin) for place, begin in zip(places, first, strict=True)]
    return out[torch.tensor(rows, device=out.device), torch.arange(len(rows), device=out.device)].unsqueeze(0)


def check_depth(speaker: Speaks, depth: int) -> None:
    """Raises ValueError for drafts that the model cannot make."""
    config = speaker.model.context.config
    if depth < 0:
        raise ValueError(f"speculative.depth={depth} must be 0 (no drafts) or more")
    if depth and not config.mtp_depths:
        raise ValueError(f"speculative.depth={depth} needs multi-token prediction, which the model has none of: leave it out")
    if depth > config.mtp_depths and not config.mtp_shared:
        raise ValueError(
            f"speculative.depth={depth} is more than the {config.mtp_depths} MTP depths of the model, which share no block: give at most that"
        )
