"""Megatron's layer pattern: one letter a layer, `/` opens a multi-token-prediction depth, `|` ends a part of the pipeline.

    M  Mamba-2        *  attention        E  (Latent)MoE        -  dense MLP        and whatever else is registered (see `model.mixer`)

`MEM*EME/*E/*E`: seven layers, and two MTP depths of one attention and one MoE layer each. `MEM*|EME/*E/*E`: the same model, the first four layers on
the first of two pipeline stages.
"""

from dataclasses import dataclass

from model.mixer import MIXERS, letters_for_people


@dataclass(frozen=True)
class Pattern:
    """main: the stack; mtp: the layers of each MTP depth, nearest first; parts: how many layers of the stack each part of a pipeline holds,
    empty where the pattern leaves that open."""

    main: str
    mtp: tuple[str, ...]
    parts: tuple[int, ...] = ()


def parse(pattern: str) -> Pattern:
    """Raises ValueError, naming the key and the place, for a pattern that means nothing."""
    depths = 0
    for place, letter in enumerate(pattern):
        depths += letter == "/"
        if letter not in "/|" and letter not in MIXERS:
            raise ValueError(
                f"model.pattern={pattern!r} has {letter!r} at position {place + 1}: use {letters_for_people()}, / (an MTP depth) and | (a part of "
                "the pipeline)"
            )
        if letter == "|" and depths:
            raise ValueError(
                f"model.pattern={pattern!r} has '|' at position {place + 1}, in an MTP depth, but these are all on the last stage: delete it"
            )
    stack, *mtp = pattern.split("/")
    main = stack.replace("|", "")
    if not main:
        raise ValueError(f"model.pattern={pattern!r} has no layer before the first '/': the main stack needs at least one")
    if not all(mtp):
        raise ValueError(f"model.pattern={pattern!r} has an empty MTP depth: put layers after every '/', or delete it")
    parts = tuple(map(len, stack.split("|"))) if "|" in stack else ()
    if 0 in parts:
        raise ValueError(f"model.pattern={pattern!r} has a part of the pipeline without a layer: put layers before and after every '|'")
    return Pattern(main, tuple(mtp), parts)


def without_parts(pattern: str) -> str:
    """The pattern of the same model, whose layers lie on no stage in particular."""
    return pattern.replace("|", "")
