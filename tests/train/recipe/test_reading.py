"""Open groups: what is registered brings keys of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from train.recipe.reading import RecipeError, defaults, plain, read


@dataclass(frozen=True)
class Wide:
    wide_heads: int | None = None
    wide_share: float = 0.5


@dataclass(frozen=True)
class Deep:
    deep_layers: int = 2


def kinds() -> dict[str, type]:
    return {"W": Wide, "D": Deep}


@dataclass(frozen=True)
class Flat:
    size: int
    sizes: Mapping[str, Any] = field(default_factory=dict, metadata={"kinds": kinds, "flat": True})


@dataclass(frozen=True)
class Nested:
    name: str = "W"
    options: Mapping[str, Any] = field(default_factory=dict, metadata={"kinds": kinds})


@dataclass(frozen=True)
class Partial:
    options: Mapping[str, Any] = field(default_factory=dict, metadata={"kinds": kinds, "partial": True})


def test_flat_keys_stand_in_the_group() -> None:
    group = read(Flat, {"size": 3, "wide_heads": 4}, "model")
    assert group.sizes == {"W": Wide(wide_heads=4), "D": Deep()}
    assert plain(group) == {"size": 3, "wide_heads": 4, "wide_share": 0.5, "deep_layers": 2}
    assert read(Flat, plain(group), "model") == group
    assert defaults(Flat) == {"wide_heads": None, "wide_share": 0.5, "deep_layers": 2}
    with pytest.raises(RecipeError, match=r"model.wide_head is no key of a recipe \(model.wide_head=4\): did you mean model.wide_heads\?"):
        read(Flat, {"size": 3, "wide_head": 4}, "model")


def test_nested_keys_stand_in_a_group_of_their_own() -> None:
    group = read(Nested, {"W": {"wide_share": 1}}, "group")
    assert group.options == {"W": Wide(wide_share=1.0), "D": Deep()}
    assert read(Nested, plain(group), "group") == group
    with pytest.raises(RecipeError, match=r"group.W.wide_share='all' must be a number"):
        read(Nested, {"W": {"wide_share": "all"}}, "group")


def test_partial_keeps_what_was_given() -> None:
    group = read(Partial, {"D": {"deep_layers": 5}}, "rules[0]")
    assert group.options == {"D": {"deep_layers": 5}}
    assert plain(group) == {"D": {"deep_layers": 5}}
    assert defaults(Partial) == {}
