"""`key=value` arguments, in Hydra's own syntax, for the commands that need no recipe (report, compare)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException


def key_values(arguments: Sequence[str], known: Iterable[str]) -> dict[str, Any]:
    """`["runs=[a,b]", "to=x"]` -> `{"runs": ["a", "b"], "to": "x"}`.

    Raises ValueError, in one sentence, for an argument that is no `key=value` or whose key is not in `known`.
    """
    known = tuple(known)
    values: dict[str, Any] = {}
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            raise ValueError(f"{argument!r} is not understood: write {known[0]}=..., with lists as [a,b]") from None
        key = override.key_or_group
        if override.type is not OverrideType.CHANGE or key not in known:
            raise ValueError(f"{argument!r} is unknown here: the keys are {', '.join(known)}")
        value = override.value()
        if override.is_sweep_override() or isinstance(value, dict):
            raise ValueError(f"{argument!r} is neither a value nor a list: write a list as {key}=[a,b]")
        values[key] = value
    return values
