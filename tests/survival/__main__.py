"""A sweep of journeys: `python -m tests.survival kills=110 seed=1 to=runs/survival`.

to: a directory; results are appended to its results.jsonl, and a sweep that was ended goes on behind them. journey=7: that one alone, again, to look
at its outputs in TO/journey-7. ranks=[1,2]: only runs of so many ranks.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.survival.journey import KINDS
from tests.survival.sweep import again, sweep, table
from train.arguments import key_values


def main(arguments: Sequence[str]) -> int:
    values = key_values(arguments, ("kills", "seed", "to", "journey", "ranks"))
    root, seed = Path(values.get("to", "runs/survival")).absolute(), int(values.get("seed", 1))
    kinds = [kind for kind in KINDS if kind.ranks in values.get("ranks", (1, 2, 4))]
    if "journey" in values:
        results = again(root, seed, int(values["journey"]), kinds)
    else:
        results = sweep(root, seed, int(values.get("kills", 108)), kinds)
    print(table(results))
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
