"""A sweep of journeys: `python -m tests.survival kills=120 seed=1 to=runs/survival`.

to: a directory; results are appended to its results.jsonl, and a sweep that was ended goes on behind them. journey=7: that one alone, again, to look
at its outputs in TO/journey-7.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.survival.sweep import again, sweep, table
from train.arguments import key_values


def main(arguments: Sequence[str]) -> int:
    values = key_values(arguments, ("kills", "seed", "to", "journey"))
    root, seed = Path(values.get("to", "runs/survival")).absolute(), int(values.get("seed", 1))
    if "journey" in values:
        results = again(root, seed, int(values["journey"]))
    else:
        results = sweep(root, seed, int(values.get("kills", 108)))
    print(table(results))
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
