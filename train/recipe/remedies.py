"""Which values near those of a recipe would do: found by trying, so that a remedy is never more than one of the checks themselves has passed.

A check that finds values that do not fit together raises `Misfit` with the keys that could give way. Each key is moved away from its value, down and
up, until the whole recipe passes; where no single key can mend everything, until these keys are not what is wrong any more.
"""

import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from parallel.misfit import Misfit
from train.recipe.tree import Recipe

Check = Callable[[Recipe, int], None]
"""(recipe, ranks): raises ValueError for what cannot be."""

FARTHEST = 1024  # how far from its value a number is tried
MOST_TRIES = 16  # how many values that pass the quick check are put to the whole one
RANKS = "ranks"


def ended(misfit: Misfit, recipe: Recipe, ranks: int, quick: Check, whole: Check) -> str:
    """The sentence of a misfit, with a remedy. quick: finds misfits of shapes, and is tried often; whole: everything that a recipe must pass."""

    def mends(changed: Recipe, on: int) -> bool:
        return _problem(quick, changed, on) is None and next(tries, None) is not None and _problem(whole, changed, on) is None

    def leaves_others(changed: Recipe, on: int) -> bool:
        problem = _problem(quick, changed, on)
        return problem is None or (isinstance(problem, Misfit) and not set(problem.keys) & set(misfit.keys))

    remedies: list[str] = []
    for good in (mends, leaves_others):
        for key in misfit.keys:
            values = []
            for way in _values(recipe, ranks, key):
                tries = iter(range(MOST_TRIES))
                values += list(islice((value for value in way if good(*_changed(recipe, ranks, key, value))), 1))
            remedies += [_remedy(key, values)] if values else []
        if remedies:
            break
    remedies += [misfit.otherwise] if misfit.otherwise else []
    return f"{misfit}: {', or '.join(remedies) or 'change ' + ' or '.join(misfit.keys)}"


def _problem(check: Check, recipe: Recipe, ranks: int) -> ValueError | None:
    try:
        check(recipe, ranks)
    except ValueError as error:
        return error
    return None


def _remedy(key: str, values: list[Any]) -> str:
    """`use parallel.tensor=2 or 4`."""
    shown = " or ".join(str(value).lower() for value in sorted(values))
    return f"start {shown} rank{'s' * (values != [1])}" if key == RANKS else f"use {key}={shown}"


def _values(recipe: Recipe, ranks: int, key: str) -> list[Iterator[Any]]:
    """What to try instead, from the nearest on; of numbers below and above."""
    value = ranks if key == RANKS else _value(recipe, key)
    if isinstance(value, bool):
        return [iter([not value])]
    if isinstance(value, int):
        return [
            iter(range(value - 1, max(0, value - FARTHEST), -1)),
            iter(range(max(value + 1, 0), value + FARTHEST)),
        ]
    if isinstance(value, str):
        group, name = key.split(".")
        options = typing.get_args(typing.get_type_hints(type(getattr(recipe, group)))[name])
        return [iter([option]) for option in options if isinstance(option, str) and option != value]
    return []  # open, or of another type


def _value(recipe: Recipe, key: str) -> Any:
    group, name = key.split(".")
    return recipe.model.size(name) if group == "model" else getattr(getattr(recipe, group), name)


def _changed(recipe: Recipe, ranks: int, key: str, value: Any) -> tuple[Recipe, int]:
    if key == RANKS:
        return recipe, value
    group, name = key.split(".")
    part = getattr(recipe, group)
    return replace(recipe, **{group: part.changed(**{name: value}) if group == "model" else replace(part, **{name: value})}), ranks
