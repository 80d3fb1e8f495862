"""The layouts of the matrix: every axis alone, every pair that fits, triples and more, on 2, 4 and 8 ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BY_HAND = "MEM*E|ME/*E/*E"  # two parts, the first much longer

STARVING = "an expert without tokens"
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "": (),
    # 12 sequences of 36 tokens in threes: 4 microbatches, or 2 on each of two ranks; neither 36 nor a rank's part of it is a multiple of Mamba's
    # chunks of 16.
    "uneven batch": ("train.global_batch_size=12", "train.sequence_length=36", "train.micro_batch_size=3"),
    STARVING: ("run.seed=3",),  # with which no token's choice hangs on rounding, see `tests.layouts.run.Margins`
}


@dataclass(frozen=True)
class Case:
    """A layout. parallel: keys of that group; those left out are 1 or off. sequences: of a microbatch; None: as the setting says. pattern: if it has
    a `|`."""

    ranks: int
    parallel: Mapping[str, Any] = field(default_factory=dict)
    setting: str = ""
    sequences: int | None = None
    pattern: str | None = None
    usual: bool = False
    """of the default tier"""

    @property
    def starved(self) -> bool:
        return self.setting == STARVING

    @property
    def overrides(self) -> tuple[str, ...]:
        keys = [f"parallel.{key}={_written(value)}" for key, value in self.parallel.items()]
        if self.sequences is not None:
            keys.append(f"train.micro_batch_size={self.sequences}")
        if self.pattern is not None:
            keys.append(f"model.pattern='{self.pattern}'")
        return (*SETTINGS[self.setting], *keys)

    @property
    def name(self) -> str:
        """For a person, and the same for no other layout."""
        size = {key: int(self.parallel.get(key, 1)) for key in ("tensor", "expert", "expert_tensor", "pipeline", "context")}
        sizes = {**size, "data": self.ranks // (size["tensor"] * size["pipeline"] * size["context"])}
        words = [f"{key.replace('_', ' ')} {n}" for key, n in sizes.items() if n > 1]
        if (parts := self.parallel.get("virtual_pipeline", 1)) > 1:
            words[words.index(f"pipeline {size['pipeline']}")] += f" of {parts} parts each"
        text = " x ".join(words) or "one rank"
        if self.pattern is not None:
            text += f", `{self.pattern}`"
        if self.parallel.get("context_mamba") == "all_to_all":
            text += ", Mamba by all-to-all"
        if self.parallel.get("distributed_optimizer"):
            text += ", distributed optimizer"
        if self.parallel.get("overlap_param_gather"):
            text += ", all overlapped"
        elif self.parallel.get("overlap_grad_reduce"):
            text += ", gradient reduce overlapped"
        if kinds := self.parallel.get("recompute"):
            text += f", computing {' and '.join(kinds)} again"
        if self.sequences is not None:
            text += f", {self.sequences} sequence{'s' * (self.sequences > 1)} at a time"
        return text + (f"; {self.setting}" if self.setting else "")


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def usual(ranks: int, pattern: str | None = None, **parallel: Any) -> Case:
    return Case(ranks, parallel, pattern=pattern, usual=True)


def case(ranks: int, setting: str = "", sequences: int | None = None, pattern: str | None = None, **parallel: Any) -> Case:
    return Case(ranks, parallel, setting, sequences, pattern)


SHARDED: Mapping[str, Any] = {"distributed_optimizer": True}
OVERLAPPED: Mapping[str, Any] = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
HEADS: Mapping[str, Any] = {"context_mamba": "all_to_all"}

MATRIX: tuple[Case, ...] = (
    # What one rank is from itself, when it adds up the same sums in another order.
    case(1, sequences=8),
    case(1, "uneven batch", sequences=4),
    case(1, STARVING, sequences=8),
    # The default tier.
    usual(2, BY_HAND, pipeline=2),
    usual(2, pipeline=2, virtual_pipeline=2),
    usual(2, expert_tensor=2),
    usual(2, tensor=2),
    usual(2, expert=2),
    usual(2, pipeline=2),
    usual(2),
    usual(2, **SHARDED),
    usual(4, tensor=2, expert=2),
    usual(4, tensor=2),
    usual(2, context=2),
    usual(4, tensor=2, pipeline=2),
    # Axes alone.
    case(4, expert=4),
    case(4, expert_tensor=4),
    case(4, pipeline=4),
    case(2, pipeline=2, virtual_pipeline=3),
    case(2, sequences=1, pattern="M|EM|*|EME/*E/*E", pipeline=2, virtual_pipeline=2),
    case(4, pattern="M|EM*|E|ME/*E/*E", pipeline=4),
    case(4, context=4),
    case(2, context=2, **HEADS),
    case(4, context=4, **HEADS),
    case(8, context=8),
    case(4),
    case(8, sequences=1, **SHARDED),
    case(2, overlap_grad_reduce=True),
    case(2, **OVERLAPPED),
    case(8, sequences=1, expert=4, **OVERLAPPED),
    case(2, recompute=("norm", "activation", "moe", "head", "mamba"), **SHARDED),
    # Pairs.
    case(2, tensor=2, expert=2),
    case(2, tensor=2, expert_tensor=2),
    case(4, tensor=2, pipeline=2, virtual_pipeline=2),
    case(4, tensor=2, context=2),
    case(4, tensor=2, context=2, **HEADS),
    case(4, tensor=2, **SHARDED),
    case(8, tensor=2),
    case(4, expert=2, expert_tensor=2),
    case(4, expert=2, pipeline=2),
    case(4, expert=2, pipeline=2, virtual_pipeline=2),
    case(2, expert=2, context=2),
    case(4, expert=2, **SHARDED),
    case(4, expert_tensor=2, pipeline=2),
    case(4, expert_tensor=2, pipeline=2, virtual_pipeline=2),
    case(2, expert_tensor=2, context=2),
    case(4, expert_tensor=2, **SHARDED),
    case(4, pipeline=2, context=2),
    case(4, pipeline=2, virtual_pipeline=2, context=2),
    case(4, pipeline=2, **SHARDED),
    case(4, pipeline=2, virtual_pipeline=2, **OVERLAPPED),
    case(8, pipeline=4, **SHARDED),
    case(4, context=2, **SHARDED),
    case(8, context=4, **OVERLAPPED),
    # Triples.
    case(4, tensor=2, expert=2, expert_tensor=2),
    case(4, tensor=2, expert=2, pipeline=2),
    case(8, tensor=2, expert=2, pipeline=2),
    case(8, tensor=2, expert=4, **OVERLAPPED),
    case(8, tensor=2, pipeline=2, context=2),
    case(8, tensor=2, pipeline=4),
    case(4, expert=2, pipeline=2, context=2),
    case(8, sequences=1, expert=2, expert_tensor=2, pipeline=2, virtual_pipeline=2),
    case(8, tensor=2, expert_tensor=2, context=2, **HEADS),
    case(8, pipeline=2, context=2, **SHARDED),
    # Four and more.
    case(8, tensor=2, expert=2, expert_tensor=2, pipeline=2),
    case(8, tensor=2, expert=2, pipeline=2, **OVERLAPPED),
    case(8, tensor=2, expert=2, pipeline=2, virtual_pipeline=2, context=2),
    case(8, tensor=2, expert=4, expert_tensor=2, **SHARDED),
    case(8, tensor=2, expert=2, expert_tensor=2, context=2, **OVERLAPPED),
    case(8, pattern="M|EM|*|EME/*E/*E", tensor=2, expert=2, pipeline=2, virtual_pipeline=2, context=2, **HEADS),
    # Batches, sequences and documents that do not divide evenly.
    case(2, "uneven batch"),
    case(4, "uneven batch", **SHARDED),
    case(2, "uneven batch", sequences=4, pipeline=2, virtual_pipeline=2),
    case(4, "uneven batch", pattern=BY_HAND, tensor=2, pipeline=2),
    case(4, "uneven batch", tensor=2, context=2),
    case(8, "uneven batch", sequences=1, context=4, expert=2),
    case(8, "uneven batch", tensor=2, expert=2, pipeline=2, context=2),
    # One expert without tokens; with expert=4 the rank that holds it has nothing to do.
    case(2, STARVING, expert=2),
    case(4, STARVING, expert=4),
    case(4, STARVING, tensor=2, expert=4),
    case(4, STARVING, expert=2, expert_tensor=2),
    case(8, STARVING, sequences=1, expert=4, pipeline=2, virtual_pipeline=2, **SHARDED),
)
