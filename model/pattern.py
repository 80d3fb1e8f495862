"""Megatron's layer pattern: one letter a layer, `/` opens a multi-token-prediction depth.

    M  Mamba-2        *  attention        E  (Latent)MoE        -  dense MLP        and whatever else is registered (see `model.mixer`)

`MEM*EME/*E/*E`: seven layers, and two MTP depths of one attention and one MoE layer each.
"""

from dataclasses import dataclass

from model.mixer import MIXERS, letters_for_people


@dataclass(frozen=True)
class Pattern:
    """main: the stack; mtp: the layers of each MTP depth, nearest first."""

    main: str
    mtp: tuple[str, ...]


def parse(pattern: str) -> Pattern:
    """Raises ValueError, naming the key and the place, for a pattern that means nothing."""
    for place, letter in enumerate(pattern):
        if letter != "/" and letter not in MIXERS:
            raise ValueError(
                f"model.pattern={pattern!r} has {letter!r} at position {place + 1}: use {letters_for_people()} and / (an MTP depth)"
            )
    main, *mtp = pattern.split("/")
    if not main:
        raise ValueError(f"model.pattern={pattern!r} has no layer before the first '/': the main stack needs at least one")
    if not all(mtp):
        raise ValueError(f"model.pattern={pattern!r} has an empty MTP depth: put layers after every '/', or delete it")
    return Pattern(main, tuple(mtp))
