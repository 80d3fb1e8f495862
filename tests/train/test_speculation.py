"""Drafts change no token: what is drafted, checked and taken back, and that every token is computed to the same last bit."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model.batch import Microbatch
from model.cache import Cache
from model.hybrid import HybridModel
from parallel import groups
from tests.train.recipes import recipe
from train.build import build_model
from train.generation.acceptance import Acceptance
from train.generation.drafter import Drafter
from train.generation.sampling import Sampling
from train.generation.speaks import following
from train.generation.texts import generate, read

PROMPTS = (list(b"It is a truth"), [65], list(b"Mr. Darcy said that she was not at all sorry"))
MODELS = {
    "shared": ("precision=fp32", "model.pattern=ME*MEM*/*E/*E"),
    "bf16": ("precision=bf16", "model.pattern=ME*MEM*/*E/*E"),
    # Depths of their own, which have a state; numbers of experts and channels that leave something over of every vector.
    "unshared": (
        "precision=fp32",
        "model.pattern=ME*-/ME/*E",
        "model.ffn_hidden_size=32",
        "model.mtp_shared=false",
        "model.hidden_size=48",
        "model.experts=5",
        "model.mamba_heads=6",
        "model.mamba_head_dim=6",
        "model.mamba_state_size=9",
    ),
}


@dataclass
class Few:
    """Says one of few tokens, so that drafts of a model that has learnt nothing are often right."""

    model: HybridModel
    step: int = 0
    progress: float = 1.0
    vocabulary: int = 3


@pytest.fixture(params=MODELS)
def speaker(request: pytest.FixtureRequest) -> Iterator[Few]:
    made = recipe(*MODELS[request.param])
    _, (model,) = build_model(made, groups.initialize(made.parallel, made.run.seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
    yield Few(model.eval())
    groups.shutdown()


def texts_of(speaker: Few, sampling: Sampling, depth: int, tokens: int = 40, acceptance: Acceptance | None = None) -> list[list[int]]:
    turns = list(generate(speaker, PROMPTS, tokens, sampling, depth=depth, acceptance=acceptance))
    return [[token for turn in turns if (token := turn[text]) is not None] for text in range(len(PROMPTS))]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(1.0, 0.95, seed=3)])
def test_drafts_change_no_token(sampling: Sampling, speaker: Few) -> None:
    plain = texts_of(speaker, sampling, 0)
    assert {len(text) for text in plain} == {40} and len(set(map(tuple, plain))) > 1
    for depth in (1, 2, 5) if speaker.model.context.config.mtp_shared else (1, 2):
        acceptance = Acceptance.none(len(PROMPTS), depth)
        assert texts_of(speaker, sampling, depth, acceptance=acceptance) == plain
        rounds = acceptance.rounds.sum(0)
        assert rounds[0] > 0 and (sampling.temperature == 0 or rounds[1:].sum() > 3)  # some were taken back, and some were not
        assert (rounds * torch.arange(1, depth + 2)).sum() >= 3 * 39  # the first token of a text needs no round


def passes(speaker: Few, cache: Cache, tokens: Sequence[int]) -> Tensor:
    """Logits behind each of these tokens, [sequence, vocabulary]."""
    microbatch = following(speaker, torch.tensor([tokens]), cache, [0])
    return speaker.model.lm_head(speaker.model.hidden(microbatch), microbatch)[:, 0]


@torch.inference_mode()
def test_every_token_is_computed_as_if_it_came_alone(speaker: Few) -> None:
    def begun() -> Cache:
        _, cache = read(speaker, PROMPTS[0], 0)
        cache.revocable = cache.singly = True
        return cache

    text = list(b" universally acknowledged, that a single man in possession of a good fortune")
    cache, alone = begun(), []
    for token in text:
        alone.append(passes(speaker, cache, [token])[0])
        cache.advance(1)
    draw = random.Random(5)
    for count in (2, 3, 5, 8):
        cache, done = begun(), 0
        while done + count <= len(text):
            right = draw.randint(1, count)  # the others are guesses, taken back
            logits = passes(speaker, cache, text[done : done + right] + [draw.randrange(256) for _ in range(count - right)])
            for place in range(right):
                assert torch.equal(logits[place], alone[done + place])
            cache.accept([right])
            done += right


def drafts_in_one_pass(speaker: Few, tokens: Sequence[int], depth: int) -> list[int]:
    """Those behind the last token, by passes over the whole text without a cache."""
    made: list[int] = []
    for _ in range(depth):
        ids = torch.tensor([[*tokens, *made]])
        zeros, ahead = torch.zeros_like(ids), len(made) + 1
        batch = Microbatch.of(
            tokens=ids, labels=ids, loss_mask=zeros.bool(), documents=zeros.int(), reset=False, sample=zeros[:, 0], step=0, depths=ahead
        )
        hidden = speaker.model.hidden(batch)
        for number in range(1, ahead + 1):
            hidden = speaker.model.deeper(hidden, batch.tokens[number], batch, number)
        made.append(int(speaker.model.lm_head(hidden, batch)[len(tokens) - 2, 0, : speaker.vocabulary].argmax()))
    return made


@torch.inference_mode()
def test_drafts_are_those_of_whole_passes(speaker: Few) -> None:
    text, draw = list(b"It is a truth universally acknowledged"), random.Random(2)
    speaker.vocabulary = 256
    depth = 4 if speaker.model.context.config.mtp_shared else 2
    ids = torch.tensor([text + [0] * (depth + 8)])
    hidden = speaker.model.hidden(following(speaker, torch.tensor([text]), Cache.empty(1, torch.device("cpu")), [0]))
    drafter = Drafter.of(speaker, depth, 0)
    for part in (hidden[:1], hidden[1:9], hidden[9:12]):
        drafter.read(part, ids)
    drafter, done, compared = Drafter.joined([drafter]), 12, 0
    while done + 4 < len(text):
        fresh = draw.randint(1, 3)
        given = torch.cat((hidden[done : done + fresh], torch.randn(2, 1, hidden.shape[-1])))  # what was taken back counts for nothing
        done += fresh
        held = ids.clone()
        held[:, done + 1 :] = 0
        drafter.draft(given, [fresh], held, Sampling(temperature=0))
        assert held[0, done + 1 : done + 1 + depth].tolist() == drafts_in_one_pass(speaker, text[: done + 1], depth)
        compared += len(set(held[0, done + 1 : done + 1 + depth].tolist())) > 1
    assert compared > 2


@pytest.mark.parametrize("speaker", ["unshared"], indirect=True)
def test_depths_that_share_no_block_are_not_applied_again(speaker: Few) -> None:
    with pytest.raises(ValueError, match=r"^speculative.depth=3 is more than the 2 MTP depths of the model, which share no block: "):
        next(generate(speaker, PROMPTS, 5, Sampling(), depth=3))
