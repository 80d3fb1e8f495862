"""What a mixer, the heart of a layer, declares about itself; and the registry, from which patterns take their letters.

A mixer is one file: its module, the sizes it needs, and one call of `register_mixer` that says the rest. Nothing else in the product knows its
letter or its keys: reading and checking recipes, layouts, counts, the precision table and the exchange with Hugging Face all ask here.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from torch import nn

from parallel.layout import ParallelConfig

if TYPE_CHECKING:
    Needed = int
else:
    Needed = Annotated[int | None, "needed"]
"""A size that must be given, at least 1, when the mixer's letter is in the pattern: then it is an int, and otherwise it may be None."""

NOT_GIVEN: Any = None
"""The default of a `Needed` size."""


@dataclass(frozen=True)
class Sizes:
    """Base of the sizes a mixer needs: a frozen dataclass whose fields, all with a default, are keys of the recipe's `model` group."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence naming the key, for sizes that cannot be. Called for the letters in the pattern, when what is
        needed is given."""

    @classmethod
    @cache
    def needed(cls) -> tuple[str, ...]:
        """Keys without which there is no such layer."""
        hints = typing.get_type_hints(cls, include_extras=True)
        return tuple(name for name, hint in hints.items() if "needed" in getattr(hint, "__metadata__", ()))


S = TypeVar("S", bound=Sizes)


Axis = Literal["tensor", "expert", "expert_tensor", "context"]
"""Keys of the recipe's `parallel` group by which ranks share out what belongs to one layer."""


@dataclass(frozen=True)
class Dimension:
    """A size that ranks share out equally. key: of the recipe's `model` group; axes: of which the product must divide it."""

    key: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Products:
    """Matrix products outside linear layers, for the accounts. flops: forward, per token; fp32: whatever precision.compute is."""

    what: str
    flops: float
    fp32: bool = False


@dataclass(frozen=True)
class HuggingFace:
    """How a NemotronH config.json says it. layer_type: in layers_block_type; aliases: other names of the same, read and never written.
    keys: theirs -> ours, of which several may be one of ours. constants: what config.json must say of this mixer, which has no choice there."""

    layer_type: str
    aliases: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mixer(Generic[S]):
    """A kind of layer.

    letter: in patterns. name: for people. sizes: its keys in the recipe. build: (ModelContext, canonical name) -> its module, called with
    x [sequence, batch, hidden] and a Microbatch, whose result has the shape of x.
    dimensions: which of its sizes ranks share out, and over which axes. check_layout: raises `parallel.misfit.Misfit` for other layouts it cannot
    have. products: of a sequence of that many tokens. active_share: the part of a parameter (its name inside the module) that one token uses.
    context_tokens: consecutive tokens that a rank must hold at least where parallel.context splits sequences; None: it only knows whole ones.
    engine: what the engine must know, as fields of `parallel.engine.ModelSizes`. hugging_face: None where NemotronH has no such layer.
    """

    letter: str
    name: str
    build: Callable[..., nn.Module]
    sizes: type[S]
    dimensions: tuple[Dimension, ...] = ()
    check_layout: Callable[[S, ParallelConfig], None] = lambda sizes, parallel: None
    products: Callable[[S, int], tuple[Products, ...]] = lambda sizes, sequence_length: ()
    active_share: Callable[[S, str], float] = lambda sizes, parameter: 1.0
    context_tokens: Callable[[S], int] | None = None
    engine: Callable[[S], Mapping[str, int]] = lambda sizes: {}
    hugging_face: HuggingFace | None = None

    @property
    def has_experts(self) -> bool:
        """Whether it can be spread over an expert group."""
        return any("expert" in dimension.axes for dimension in self.dimensions)


MIXERS: dict[str, Mixer[Any]] = {}
"""By letter, in the order of registration."""

RESERVED = "/|"
"""Letters of a pattern that are no layer."""


def register_mixer(mixer: Mixer[Any]) -> None:
    """Makes a mixer known: its letter in patterns, its keys in the recipe's `model` group.

    Raises ValueError when the letter is no single free one, or its keys are another mixer's or have no default.
    """
    if len(mixer.letter) != 1 or mixer.letter in RESERVED or mixer.letter in MIXERS:
        raise ValueError(
            f"the mixer {mixer.name!r} cannot have the letter {mixer.letter!r}: use one character other than {' '.join((*RESERVED, *MIXERS))}"
        )
    taken = {f.name: other.name for other in MIXERS.values() if other.sizes is not mixer.sizes for f in dataclasses.fields(other.sizes)}
    for key in dataclasses.fields(mixer.sizes):
        if key.name in taken:
            raise ValueError(f"the mixer {mixer.name!r} cannot have the key {key.name}, which {taken[key.name]} has: choose another name")
        if key.default is dataclasses.MISSING and key.default_factory is dataclasses.MISSING:
            raise ValueError(f"the key {key.name} of the mixer {mixer.name!r} has no default: give it one, NOT_GIVEN where it is needed")
    MIXERS[mixer.letter] = mixer


def mixer_sizes() -> dict[str, type[Sizes]]:
    """The sizes of all mixers by the name of their class; mixers may share one."""
    return {mixer.sizes.__name__: mixer.sizes for mixer in MIXERS.values()}


def letters_for_people() -> str:
    """`* (attention), M (Mamba-2)`."""
    return ", ".join(f"{mixer.letter} ({mixer.name})" for mixer in MIXERS.values())
