"""What attention buys a Mamba-2 model that has to find what it has read: recall over arms, sizes and learning rates.

    python -m experiments.retrieval                       # trains what is missing, then writes tables and pictures
    python -m experiments.retrieval train=false to=docs/retrieval     # of the runs there are

runs=runs/retrieval-sweep: where they lie. processes=2: runs beside each other, one thread each. arms=[5to1-dense,...], rates=[...], seeds=2 and
steps: of the sweep (other steps in a directory of their own).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.retrieval.arms import ARMS
from experiments.retrieval.report import report
from experiments.retrieval.sweep import RATES, arm_of, read_results, sweep
from train.arguments import key_values


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        values = key_values(arguments, ("runs", "to", "train", "processes", "arms", "rates", "seeds", "steps"))
        directory = Path(str(values.get("runs", "runs/retrieval-sweep")))
        arms = tuple(arm_of(str(name)) for name in values.get("arms", [arm.name for arm in ARMS]))
        try:
            rates = tuple(float(rate) for rate in values.get("rates", RATES))
            seeds, processes = int(values.get("seeds", 2)), int(values.get("processes", 2))
        except (ValueError, TypeError):
            given = ", ".join(f"{key}={values[key]}" for key in ("rates", "seeds", "processes") if key in values)
            raise ValueError(
                f"{given}: rates is a list of numbers, seeds and processes are whole numbers: rates=[1e-3,3e-3] seeds=2"
            ) from None
        if min(seeds, processes, len(rates)) < 1:
            raise ValueError(f"rates={list(rates)}, seeds={seeds} and processes={processes} leave nothing to do: give at least one of each")
        more = [f"train.steps={int(values['steps'])}"] if "steps" in values else []
        if values.get("train", True):
            results = sweep(directory, arms=arms, rates=rates, seeds=seeds, processes=processes, more=more)
        else:
            results = read_results(directory / "results.jsonl")
        if not results:
            raise ValueError(f"{directory} holds no results: leave train=false out, which makes them")
        print("\n" + report(results, Path(str(values.get("to", directory / "report")))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
