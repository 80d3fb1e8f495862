"""key=value arguments of the benchmarks."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.arguments import key_values


def main(run: Callable[..., None], defaults: Mapping[str, Any], arguments: Sequence[str] | None) -> int:
    """Calls `run` with the defaults, changed by key=value arguments; the exit status, 2 for a wrong argument."""
    try:
        given = key_values(list(sys.argv[1:] if arguments is None else arguments), tuple(defaults))
        for name, value in given.items():
            default = defaults[name]
            items = value if isinstance(default, list) and isinstance(value, list) else [value]
            sample = default[0] if isinstance(default, list) else default
            good = all(type(item) is type(sample) and (isinstance(item, str) or item > 0) for item in items)
            if not items or not good:
                kind = "a text" if isinstance(sample, str) else "a whole number of at least 1"
                raise ValueError(f"{name}={value} must be {f'a list, each {kind}, as {default}' if isinstance(default, list) else kind}")
            given[name] = items if isinstance(default, list) else value
        run(**{**defaults, **given})
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
