"""The arms: which layers mix tokens, which layers work on each token, and sizes that give all of them as many active parameters.

    attention   each behind a short convolution, for nothing else tells it what stood right before
    mamba       Mamba-2 alone
    5to1, 8to1  one attention layer to five and to eight Mamba-2 layers, behind the first of them

Each has three layers of feed-forward: dense, a mixture of experts (8, of which a token visits 2, and a shared one), or the same in a latent space of
half the width (LatentMoE). Their hidden size is what is left to choose: the one that brings the active parameters closest to TARGET.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from data.hashing import digest
from data.mqar import MQAR
from experiments.retrieval import short_convolution
from model.batch import Microbatch
from model.cache import Cache
from model.count import Count, count
from parallel import groups
from train.build import build_model
from train.recipe.load import load_recipe
from train.recipe.tree import Recipe

MIXERS = {"attention": "C*FC*FC*F", "mamba": "MMFMMFMMF", "5to1": "M*FMMFMMF", "8to1": "M*MFMMMFMMMF"}
FEED_FORWARDS = ("dense", "moe", "latent_moe")
TARGET = 720_000  # active parameters, the embedding's 524,288 among them
LENGTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Arm:
    """mixer: a key of MIXERS; feed_forward: one of FEED_FORWARDS."""

    mixer: str
    feed_forward: str

    @property
    def name(self) -> str:
        return f"{self.mixer}-{self.feed_forward}"

    def overrides(self) -> tuple[str, ...]:
        """Of the recipe `retrieval`."""
        return _overrides(self, _hidden(self))

    def recipe(self, *more: str) -> Recipe:
        return _load(*self.overrides(), *more)

    @property
    def counted(self) -> Count:
        """Parameters, by the project's own counting."""
        return _counted(self, _hidden(self))


ARMS = tuple(Arm(mixer, feed_forward) for feed_forward in FEED_FORWARDS for mixer in MIXERS)


def _load(*overrides: str) -> Recipe:
    short_convolution.register()
    return load_recipe("retrieval", *overrides)


def _overrides(arm: Arm, hidden: int) -> tuple[str, ...]:
    pattern = MIXERS[arm.mixer].replace("F", "-" if arm.feed_forward == "dense" else "E")
    mixers = f"model.pattern={pattern}", "model.convolution_channels=64"
    if arm.feed_forward == "dense":
        return *mixers, f"model.ffn_hidden_size={hidden}"
    latent = "32" if arm.feed_forward == "latent_moe" else "null"
    return (
        *mixers,
        "model.experts=8",
        "model.top_k=2",
        f"model.latent_size={latent}",
        f"model.expert_ffn_size={hidden}",
        f"model.shared_expert_ffn_size={hidden}",
    )


@cache
def _counted(arm: Arm, hidden: int) -> Count:
    return count(_load(*_overrides(arm, hidden)).model)


@cache
def _hidden(arm: Arm) -> int:
    """Active parameters are linear in the hidden size, up to rounding."""
    few, many = _counted(arm, 64).active, _counted(arm, 128).active
    first = round(64 + (TARGET - few) * 64 / (many - few))
    if first < 1:
        raise ValueError(f"{arm.name} has more than {TARGET:,} active parameters without any feed-forward: raise TARGET")
    return first


def state_bytes(arm: Arm) -> dict[int, int]:
    """What one sequence's cache holds after each of LENGTHS tokens, keys and values or states and convolution windows, in fp32: measured."""
    return _in_model(arm, _cached_bytes)


def _in_model(arm: Arm, measure: Callable[..., dict[int, int]]) -> dict[int, int]:
    recipe = arm.recipe()
    layout = groups.initialize(recipe.parallel, recipe.run.seed)
    try:
        _, (model,) = build_model(recipe, layout)
        model.eval()
        return measure(model)
    finally:
        groups.shutdown()


def _cached_bytes(model: torch.nn.Module) -> dict[int, int]:
    held = {}
    for length in LENGTHS:
        cache = Cache.empty(1, torch.device("cpu"))
        tokens = torch.from_numpy(MQAR(length, 1, 8192).draw(digest(length), length).tokens)[None]
        with torch.no_grad():
            model.hidden(Microbatch.following(tokens, cache, torch.zeros(1, dtype=torch.int64), step=0, progress=0.0))  # type: ignore[operator]
        cache.advance(length)
        held[length] = cache.bytes()
    return held
