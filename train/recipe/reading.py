"""From the plain containers of a composed recipe to frozen dataclasses, with an error that names key, value and remedy.

A group may be open: what is registered (mixers, formats, optimizers) brings keys of its own, as dataclasses. A field that holds them says so
in its metadata, and is no key itself:

    kinds     a function without arguments: {name: dataclass}
    flat      True: their keys stand directly in the group (`model.mamba_heads`); False: in a group of their own name (`precision.nvfp4.clipping`)
    partial   only what was given is kept, and what was not has no default (`precision.rules[0].nvfp4.clipping`)

The field's value is {name: instance of the dataclass}, or, partial, {name: {key: value}}.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from train.duration import Duration

T = TypeVar("T")
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class RecipeError(ValueError):
    """A recipe that cannot be run; its message is one sentence for the person who wrote it."""


def read(cls: type[T], value: object, key: str = "") -> T:
    """`value` (dicts, lists, scalars) as an instance of the dataclass `cls`.

    key: where in the recipe this is, for messages. Raises RecipeError for unknown and missing keys and for wrong types.
    """
    if not isinstance(value, Mapping):
        raise RecipeError(f"{key or 'the recipe'}={value!r} must be a group of keys such as {_first_key(cls)}")
    own, opened = _fields(cls)
    known = {**own, **{name: None for name in _open_keys(opened)}}
    for name in value:
        if name not in known:
            full = f"{key}.{name}" if key else str(name)
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {f'{key}.{near[0]}' if key else near[0]}?" if near else f"known keys are {', '.join(known)}"
            raise RecipeError(f"{full} is no key of a recipe ({full}={value[name]!r}): {hint}")
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, field in own.items():
        full = f"{key}.{name}" if key else name
        if name in value:
            arguments[name] = _convert(hints[name], value[name], full)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{full} is missing: give it in the recipe, or as {full}=... on the command line")
    for field in opened:
        arguments[field.name] = _read_open(field, value, key)
    return cls(**arguments)


def _fields(cls: type) -> tuple[dict[str, dataclasses.Field[Any]], list[dataclasses.Field[Any]]]:
    """The fields that are keys themselves, by name, and those that hold what is registered."""
    own, opened = {}, []
    for field in dataclasses.fields(cls):
        if "kinds" in field.metadata:
            opened.append(field)
        else:
            own[field.name] = field
    return own, opened


def _open_keys(opened: list[dataclasses.Field[Any]]) -> Iterator[str]:
    for field in opened:
        for name, kind in field.metadata["kinds"]().items():
            if field.metadata.get("flat"):
                yield from (inner.name for inner in dataclasses.fields(kind))
            else:
                yield name


def _read_open(field: dataclasses.Field[Any], value: Mapping[str, Any], key: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, kind in field.metadata["kinds"]().items():
        inside = f"{key}.{name}" if key else name
        if field.metadata.get("flat"):
            names = {inner.name for inner in dataclasses.fields(kind)}
            result[name] = read(kind, {k: v for k, v in value.items() if k in names}, key)
        elif not field.metadata.get("partial"):
            result[name] = read(kind, value.get(name, {}), inside)
        elif name in value:
            given = value[name]
            complete = read(kind, given, inside)
            result[name] = {k: getattr(complete, k) for k in given}
    return result


def _first_key(cls: type) -> str:
    return dataclasses.fields(cls)[0].name


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            if type(None) in args:
                return None
            raise RecipeError(f"{key}=null is not possible: give a value")
        errors = []
        options = [a for a in args if a is not type(None)]
        for option in options:
            try:
                return _convert(option, value, key)
            except RecipeError as error:
                errors.append(error)
        words = " or ".join(word for option in options if get_origin(option) is Literal for word in get_args(option))
        raise RecipeError(f"{errors[0]} or {words}") if words else errors[0]
    if dataclasses.is_dataclass(hint) and hint is not Duration:
        return read(hint, value, key)  # type: ignore[arg-type]
    if hint is Duration:
        try:
            return Duration.read(value)
        except ValueError as error:
            raise RecipeError(f"{key}={error}") from None
    if origin is Literal:
        if value not in args or isinstance(value, bool) != any(isinstance(a, bool) for a in args if a == value):
            raise RecipeError(f"{key}={value!r} is unknown: use {' or '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{key}={value!r} must be a list, as in {key}=[...]")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise RecipeError(f"{key}={list(value)} must be a list of {len(args)} values")
        return tuple(_convert(arg, item, f"{key}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 4e-3 as a text
        except ValueError:
            number = None
        if number is not None:
            if not math.isfinite(number):
                raise RecipeError(f"{key}={value} must be a finite number")
            return number
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise RecipeError(f"{key}={value!r} must be {NAMES.get(hint, hint.__name__)}")


def plain(value: Any) -> Any:
    """The inverse of `read`: dataclasses, tuples and durations as dicts, lists and scalars, ready for YAML."""
    if isinstance(value, Duration):
        return value.count if value.unit == "steps" else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own, opened = _fields(type(value))
        result = {name: plain(getattr(value, name)) for name in own}
        for field in opened:
            for name, inner in getattr(value, field.name).items():
                result |= plain(inner) if field.metadata.get("flat") else {name: plain(inner)}
        return result
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def defaults(cls: type) -> dict[str, Any]:
    """Every key of a dataclass with its default, recursively; keys without one are left out."""
    result: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    own, opened = _fields(cls)
    for name, field in own.items():
        if field.default is not dataclasses.MISSING:
            result[name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            result[name] = plain(field.default_factory())
        elif dataclasses.is_dataclass(hints[name]):
            result[name] = defaults(hints[name])  # type: ignore[arg-type]
    for field in opened:
        for name, kind in {} if field.metadata.get("partial") else field.metadata["kinds"]().items():
            result |= defaults(kind) if field.metadata.get("flat") else {name: defaults(kind)}
    return result


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of plain containers; lists are leaves."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from flatten(item, f"{key}.{name}" if key else name)
    else:
        yield key, value
