"""`--help` and docs/recipes.md: every key with its meaning, from the dataclasses themselves."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from train.duration import Duration
from train.recipe.cli import main
from train.recipe.keys import groups, keys, meanings
from train.recipe.load import base
from train.recipe.reading import flatten
from train.recipe.shipped import options, recipes

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Sizes:
    heads: int = 2
    """How many
    heads."""


@dataclass(frozen=True)
class Item:
    name: str
    """What it is called."""


def kinds() -> dict[str, type]:
    return {"M": Sizes}


@dataclass(frozen=True)
class Group:
    """Of a test."""

    length: Duration | None = Duration(3, "steps")
    """How long."""
    size: int | Literal["auto"] = "auto"
    betas: tuple[float, float] = (0.9, 1e-8)
    """Two of them."""
    items: tuple[Item, ...] = ()
    """Some."""
    more: tuple[Item, ...] = ()
    """Others."""
    flat: Mapping[str, Any] = field(default_factory=dict, metadata={"kinds": kinds, "flat": True})
    nested: Mapping[str, Any] = field(default_factory=dict, metadata={"kinds": kinds})


def test_keys_are_read_off_dataclasses() -> None:
    assert [(key.name, key.type, key.default, key.meaning) for key in keys(Group, "g.")] == [
        ("g.length", "duration or null", "3", "How long."),
        ("g.size", "whole number or auto", "auto", ""),
        ("g.betas", "list of 2 numbers", "[0.9, 1e-08]", "Two of them."),
        ("g.items", "list of groups", "[]", "Some."),
        ("g.items[i].name", "text", None, "What it is called."),
        ("g.more", "list of groups", "[]", "Others. Keys as those of g.items[i]."),
        ("g.heads", "whole number", "2", "How many heads."),
        ("g.M.heads", "whole number", "2", "How many heads."),
    ]
    assert "size" not in meanings(Group)


def test_every_key_of_the_base_is_listed() -> None:
    listed = {key.name for key in keys()}
    missing = [name for name, _ in flatten(base()) if name not in listed]
    assert not missing
    assert all(groups().values())


def test_every_key_has_a_meaning() -> None:
    silent = [key.name for key in keys() if not key.meaning]
    assert not silent, f"give each of these a text on the line after its field: {silent}"


def test_every_shipped_recipe_says_what_it_is() -> None:
    assert all(recipes().values()) and all(text for choices in options().values() for text in choices.values())


def test_the_document_is_current() -> None:
    """In a process of its own: other tests register kinds of their own."""
    written = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "train.recipe.document"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert written == (ROOT / "docs" / "recipes.md").read_text(), "run python -m train.recipe.document to=docs/recipes.md"


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert main(lambda recipe: pytest.fail("nothing runs"), "train", ["--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 90
    for key in keys():
        assert f"  {key.name}  (" in text
    for name in (*recipes(), "-cn RECIPE", "Exit status", "nvfp4_4over6"):
        assert name in text


def test_help_of_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(lambda recipe: 1, "train", ["-h", "data.tokenizer"]) == 0
    text = capsys.readouterr().out
    assert "data.tokenizer.kind" in text and "data.cache" not in text and "optimizer." not in text
    assert main(lambda recipe: 1, "train", ["--help", "datum"]) == 2
    assert "--help datum names no group of keys" in capsys.readouterr().err
