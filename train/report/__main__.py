"""The command `python -m train.report`, see `train.report.report`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from train.arguments import key_values
from train.report.report import write_report


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status (2 after one sentence about what is wrong with the arguments or the
    runs)."""
    try:
        values = key_values(arguments, ("runs", "to"))
        runs = values.get("runs", [])
        run_dirs = [Path(str(run)) for run in (runs if isinstance(runs, list) else [runs])]
        to = Path(str(values["to"])) if "to" in values else (run_dirs[0] if run_dirs else Path()) / "report"
        index = write_report(run_dirs, to)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in sorted(to.glob("*.png")):
        print(path)
    print(index)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
