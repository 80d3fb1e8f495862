"""What does NVFP4 cost? Trains one recipe twice, in fp32 and in its own precision, and draws both and their gap.

    make compare                                         # tiny
    python -m train.report.compare train.steps=200              # any key of the recipe, given to both runs
    python -m train.report.compare recipe=small to=runs/small_precision

Seed, data and initial weights are the same, so the two runs differ by precision alone. Each is a run of its own below
`to`, made by `python -m train`: an interrupted comparison goes on where it stopped, and a finished run is not
repeated.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from train.report.report import write_report

# name of the run -> what it adds to the recipe; the first is the reference of the gap
RUNS = {"fp32": ("precision=fp32",), "nvfp4": ()}
_OWN_KEYS = ("recipe", "to")
_FIXED_KEYS = ("run.dir", "run.name", "precision")


def commands(arguments: Sequence[str]) -> tuple[Path, dict[Path, list[str]]]:
    """The directory of the comparison, and for each run directory the command that trains it.

    Raises ValueError, in one sentence, for an argument that is no `key=value` or that the comparison itself decides.
    """
    own = {"recipe": "tiny", "to": "runs/compare"}
    passed: list[str] = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            raise ValueError(f"{argument!r} is not understood: write key=value, for instance train.steps=200") from None
        key = override.key_or_group
        if key in _FIXED_KEYS:
            raise ValueError(f"{argument!r} is set by the comparison itself: leave it out, or use `python -m train`")
        if override.is_sweep_override():
            raise ValueError(f"{argument!r} is a sweep: give one value, a comparison has two runs")
        if key in _OWN_KEYS and not override.is_delete():
            own[key] = str(override.value())
        else:
            passed.append(argument)
    to = Path(own["to"])
    train = [sys.executable, "-m", "train", "-cn", own["recipe"]]
    return to, {to / name: [*train, f"run.dir={to / name}", f"run.name={name}", *added, *passed] for name, added in RUNS.items()}


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status: 2 for wrong arguments, that of the training that failed otherwise."""
    try:
        to, runs = commands(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, (run_dir, command) in enumerate(runs.items(), start=1):
        print(f"[{number}/{len(runs)}] {' '.join(command[1:])}", flush=True)
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            print(f"error: the run {run_dir} ended with status {status}; see its message above", file=sys.stderr)
            return status if status > 0 else 1
    try:
        page = write_report(list(runs), to / "report")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Losses, and the gap of {list(RUNS)[1]} to {next(iter(RUNS))}:")
    for path in (to / "report" / "loss.png", to / "report" / "gap.png", page):
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
