"""The model's hyper-parameters: the recipe's `model` group."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self, TypeVar

from model.mixer import MIXERS, Dimension, Mixer, Sizes, mixer_sizes
from model.pattern import Pattern, parse
from parallel.misfit import Misfit

S = TypeVar("S", bound=Sizes)


def _open_sizes() -> dict[str, type[Sizes]]:
    """What is registered, for the reader of recipes. Raises ValueError when a mixer has one of the keys below."""
    kinds = mixer_sizes()
    own = {f.name for f in fields(ModelConfig)}
    for name, kind in kinds.items():
        if twice := sorted(own & {f.name for f in fields(kind)}):
            raise ValueError(f"{name} has the key {twice[0]}, which every model has: choose another name")
    return kinds


@dataclass(frozen=True)
class ModelConfig:
    """What every model has, and the sizes of the mixers, which each of them declares (see `model.mixer`): in a recipe their keys stand directly
    in the `model` group, and may stay null when the pattern has no layer that needs them."""

    pattern: str
    """Layers, one letter each: M Mamba-2, * attention, E (Latent)MoE, - MLP, and what else is registered; `/` opens an MTP depth."""
    vocab_size: int
    """Token ids the embedding and the head have rows for."""
    hidden_size: int
    """Width of the residual stream."""
    mixers: Mapping[str, Sizes] = field(default_factory=dict, metadata={"kinds": _open_sizes, "flat": True})
    """Sizes of the mixers, by the name of their class."""
    norm_eps: float = 1e-5
    """Added to the mean square inside every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections back to the residual stream start smaller by sqrt(2 layers)."""
    tied_embeddings: bool = False
    """The head's weight is the embedding's."""
    head_at_targets: bool = False
    """The head and its loss are computed only where a target counts, which is much quicker where few do; not with parallel.tensor above 1."""
    mtp_shared: bool = True
    """All MTP depths are one block, applied again."""
    mtp_loss_scale: float = 0.3
    """Weight of the mean loss of the MTP depths beside the LM loss; 0: they are not trained."""

    def __hash__(self) -> int:  # by hand: `mixers` has none
        return hash((self.pattern, self.vocab_size, self.hidden_size))

    @classmethod
    def of(cls, **keys: Any) -> Self:
        """From flat keys, as a recipe's `model` group has them. Raises TypeError for keys that no model and no mixer has."""
        mixers: dict[str, Sizes] = {}
        for name, kind in _open_sizes().items():
            mixers[name] = kind(**{f.name: keys.pop(f.name) for f in fields(kind) if f.name in keys})
        return cls(**keys, mixers=mixers)

    def changed(self, **keys: Any) -> Self:
        """A copy in which these keys, its own or a mixer's, have other values."""
        flat = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "mixers"}
        for sizes in self.mixers.values():
            flat |= {f.name: getattr(sizes, f.name) for f in fields(sizes)}
        return self.of(**(flat | keys))

    def sizes(self, kind: type[S]) -> S:
        """A mixer's sizes, by their class."""
        found = self.mixers.get(kind.__name__, kind())
        assert isinstance(found, kind)
        return found

    @cached_property
    def parsed(self) -> Pattern:
        return parse(self.pattern)

    @property
    def layers(self) -> str:
        """The main stack, one letter a layer."""
        return self.parsed.main

    @property
    def used(self) -> tuple[Mixer[Any], ...]:
        """The mixers of the pattern, each once."""
        letters = set("".join((self.parsed.main, *self.parsed.mtp)))
        return tuple(MIXERS[letter] for letter in sorted(letters))

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The sizes that ranks share out: the vocabulary, and what the mixers of the pattern declare."""
        return (Dimension("vocab_size", ("tensor",)), *(dimension for mixer in self.used for dimension in mixer.dimensions))

    def size(self, key: str) -> int:
        """The value of a size, the model's own or a mixer's, by its key."""
        if key in {f.name for f in fields(self)}:
            return getattr(self, key)
        (kind,) = (kind for kind in mixer_sizes().values() if key in {f.name for f in fields(kind)})
        return getattr(self.sizes(kind), key)

    @property
    def has_experts(self) -> bool:
        """Whether some layer can be spread over an expert group."""
        return any(mixer.has_experts for mixer in self.used)

    @property
    def mtp_depths(self) -> int:
        return len(self.parsed.mtp)

    @property
    def mtp_blocks(self) -> int:
        """Blocks in memory: one when shared."""
        return min(self.mtp_depths, 1) if self.mtp_shared else self.mtp_depths

    def validate(self) -> None:
        """Raises ValueError, in one sentence naming the key, for sizes no model can have."""
        pattern = self.parsed
        for key in ("vocab_size", "hidden_size"):
            _at_least_one(key, getattr(self, key))
        for mixer in self.used:
            sizes = self.sizes(mixer.sizes)
            for key in sizes.needed():
                value = getattr(sizes, key)
                if value is None:
                    raise ValueError(f"model.{key} is missing: model.pattern={self.pattern!r} has a {mixer.letter!r} layer, which needs it")
                _at_least_one(key, value)
            sizes.validate()
        if self.mtp_shared and len(set(pattern.mtp)) > 1:
            raise ValueError(
                f"model.pattern={self.pattern!r} has MTP depths that differ ({', '.join(pattern.mtp)}), but model.mtp_shared=true makes "
                "them one block: repeat the same depth, or set model.mtp_shared=false"
            )
        if self.mtp_loss_scale < 0:
            raise ValueError(f"model.mtp_loss_scale={self.mtp_loss_scale} must not be negative: use 0 to switch it off")
        for key in ("norm_eps", "init_std"):
            if not getattr(self, key) > 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must be positive")


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise Misfit(f"model.{key}={value} must be at least 1", f"model.{key}")
