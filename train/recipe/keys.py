"""Every key of a recipe with its type, default and meaning, read off the dataclasses and the texts that follow their fields.

    warmup: Duration = Duration(0, "steps")
    "Linear rise from 0 to the peak."

A field's text is a string literal on the lines after it. Python drops it, so it is taken from the source.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from train.duration import Duration
from train.recipe.reading import plain
from train.recipe.tree import Recipe

WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Duration: "duration"}


@dataclass(frozen=True)
class Key:
    """One line of the documentation. name: dotted, `[i]` for the items of a list. default: None where the recipe must give it."""

    name: str
    type: str
    default: str | None
    meaning: str

    @property
    def group(self) -> str:
        return self.name.split(".", 1)[0]


@cache
def meanings(cls: type) -> dict[str, str]:
    """Of the fields of a dataclass that have a text, inherited ones included: name -> text, as one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                found[statement.target.id] = " ".join(following.value.value.split())
    return found


def groups() -> dict[str, str]:
    """The groups of a recipe and what they are about."""
    return {field.name: meanings(Recipe).get(field.name, "") for field in dataclasses.fields(Recipe)}


def keys(cls: type = Recipe, inside: str = "") -> Iterator[Key]:
    """Every key below a dataclass, those of what is registered included, in the order in which they are declared."""
    hints = typing.get_type_hints(cls)
    listed: dict[type, str] = {}
    for field in dataclasses.fields(cls):
        name, meaning = f"{inside}{field.name}", meanings(cls).get(field.name, "")
        if "kinds" in field.metadata:
            yield from _open_keys(field, inside, meaning)
        elif dataclasses.is_dataclass(hints[field.name]) and hints[field.name] is not Duration:
            yield from keys(hints[field.name], f"{name}.")
        else:
            item = _item(hints[field.name])
            if item in listed:
                meaning = f"{meaning} Keys as those of {listed[item]}."
            yield Key(name, type_in_words(hints[field.name]), _default(field), meaning)
            if item is not None and item not in listed:
                listed[item] = f"{name}[i]"
                yield from keys(item, f"{name}[i].")


def _open_keys(field: dataclasses.Field[Any], inside: str, meaning: str) -> Iterator[Key]:
    for name, kind in field.metadata["kinds"]().items():
        if not dataclasses.fields(kind):
            continue
        if field.metadata.get("flat"):
            yield from keys(kind, inside)
        elif field.metadata.get("partial"):
            yield Key(f"{inside}{name}", "group", "{}", meaning)
        else:
            yield from keys(kind, f"{inside}{name}.")


def _item(hint: Any) -> type | None:
    """The dataclass of a list of groups."""
    args = get_args(hint)
    grouped = get_origin(hint) is tuple and isinstance(args[0], type) and dataclasses.is_dataclass(args[0]) and args[0] is not Duration
    return args[0] if grouped else None


def type_in_words(hint: Any) -> str:
    """`tuple[float, float] | None` -> `list of 2 numbers or null`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        options = [type_in_words(arg) for arg in args if arg is not type(None)]
        return " or ".join([*options, *(["null"] if type(None) in args else [])])
    if origin is Literal:
        return " or ".join(str(arg) for arg in args)
    if origin is tuple:
        if dataclasses.is_dataclass(args[0]) and args[0] is not Duration:
            return "list of groups"
        number = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"list of {number}{type_in_words(args[0])}" + "s" * (args[0] in WORDS)
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return _written(plain(field.default))
    return None if field.default_factory is dataclasses.MISSING else _written(plain(field.default_factory()))


def _written(value: Any) -> str:
    """As in YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        return value or '""'
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
