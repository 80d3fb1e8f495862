"""The command that trains, for `python -m train` and for modules of users that register something of their own first.

import my_mixer                                  # registers
from train.command import main

if __name__ == "__main__":
    raise SystemExit(main("mine"))               # python -m mine -cn tiny model.pattern=MS*E
"""

import sys
from collections.abc import Callable

from train.launcher import end_with_launcher
from train.rendezvous import adopt
from train.signals import STOPPED, StopRequested, StopSignals, ignore_from_now_on


def main(module: str = "train") -> int:
    """Reads the command line, trains, and returns the exit status (see `train.signals`).

    module: under which name a sweep starts its jobs, as in `python -m MODULE`. Signals, the launcher's end and Slurm's variables are looked after
    before the imports, which take seconds.
    """

    def start() -> int:
        from train.loop import run  # here: torch, Megatron and Hydra take seconds, in which a signal may arrive
        from train.recipe.cli import main as command_line

        return command_line(run, module, trains=True)

    return guarded(start)


def guarded(start: Callable[[], int]) -> int:
    """What `start` returns, whose imports and work are looked after."""
    end_with_launcher()
    with StopSignals():
        try:
            unfit = _adopt()
            if unfit is None:
                status = start()
            else:
                from train.refusal import refuse  # it imports torch

                status = refuse(unfit)
        except StopRequested as error:
            print(f"Stopped by {error} before the first step: start the same command again to begin.", file=sys.stderr)
            status = STOPPED
        if status == STOPPED:
            ignore_from_now_on()
    return status


def _adopt() -> str | None:
    """Why this step of Slurm cannot be a run; None: it can, or there is none."""
    try:
        adopt()
    except ValueError as error:
        return str(error)
    return None
