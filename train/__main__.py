"""`python -m train -cn tiny key=value ...` trains; started again with the same run.dir, it continues.

Exit status: see `train.signals`. Signals and the launcher's end are looked after before the imports, which take seconds.
"""

import sys

from train.launcher import end_with_launcher
from train.signals import STOPPED, StopRequested, StopSignals, ignore_from_now_on


def main() -> int:
    end_with_launcher()
    with StopSignals():
        try:
            from train.loop import run  # here: torch, Megatron and Hydra take seconds, in which a signal may arrive
            from train.recipe.cli import main as command_line

            status = command_line(run, "train")
        except StopRequested as error:
            print(f"Stopped by {error} before the first step: start the same command again to begin.", file=sys.stderr)
            status = STOPPED
        if status == STOPPED:
            ignore_from_now_on()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
