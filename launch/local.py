"""Starts a recipe on several ranks of this machine, through torchrun.

    python -m launch.local ranks=2 -cn tiny parallel.tensor=2

is `torchrun --standalone --nproc-per-node 2 -m train -cn tiny parallel.tensor=2`, with one CPU thread per rank unless OMP_NUM_THREADS says
otherwise, but the recipe is validated for that many ranks before any of them starts, and a rank that ends badly is one sentence instead of the
launcher's traceback. ranks: default one per GPU, or 1. Everything else is passed on to `python -m train`.

The exit status is that of the rank that failed first, 128 + the signal where a signal ended it; otherwise as `train.signals` says.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from train.recipe.cli import main as with_recipe
from train.recipe.tree import Recipe
from train.refusal import REFUSED, refuse
from train.signals import INTERRUPTED, STOPPED

PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # to the ranks; torchrun's own list lacks the last


def split(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """The number of ranks, and the arguments of `python -m train`. Raises ValueError, in one sentence, for a number that cannot be."""
    given = [argument for argument in arguments if argument.startswith("ranks=")]
    rest = [argument for argument in arguments if not argument.startswith("ranks=")]
    ranks = given[-1].removeprefix("ranks=") if given else str(max(torch.cuda.device_count(), 1))
    if not ranks.isdigit() or int(ranks) < 1:
        raise ValueError(f"ranks={ranks} is no number of ranks: use for instance ranks=2")
    if torch.cuda.is_available() and int(ranks) > torch.cuda.device_count():
        raise ValueError(f"ranks={ranks} exceeds the {torch.cuda.device_count()} GPUs of this machine: use one rank per GPU")
    if {"-m", "--multirun"} & set(rest):
        raise ValueError("-m is a sweep, whose jobs run one after the other on one rank each: use python -m train -m")
    return int(ranks), rest


def command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """Of torchrun."""
    return ["--standalone", "--nproc-per-node", str(ranks), f"--signals-to-handle={PASSED_ON}", "-m", "train", *arguments]


def main(arguments: Sequence[str]) -> int:
    """Validates the recipe, starts the ranks and waits for them; returns the exit status."""
    try:
        ranks, rest = split(arguments)
    except ValueError as error:
        return refuse(str(error))
    validated: list[Recipe] = []

    def note(recipe: Recipe) -> int:
        validated.append(recipe)
        return 0

    status = with_recipe(note, "launch.local", rest, ranks=ranks)
    return _start(command(ranks, rest)) if validated else status


def _start(line: Sequence[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault(
        "TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    )  # passed on; its own list lacks SIGUSR1
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it would say of a failed rank follows below, shorter
    try:
        torchrun.run(torchrun.parse_args(line))
    except ChildFailedError as failed:
        # The launcher ends the others by SIGTERM, which it may note as early as what the first one did.
        own = {rank: failure for rank, failure in failed.failures.items() if failure.exitcode != -signal.SIGTERM}
        rank, failure = min((own or failed.failures).items(), key=lambda item: item[1].timestamp)
        if failure.exitcode not in (REFUSED, STOPPED, INTERRUPTED):  # of those a sentence has been said
            how = (
                f"was ended by {signal.Signals(-failure.exitcode).name}"
                if failure.exitcode < 0
                else f"ended with status {failure.exitcode}"
            )
            print(f"error: rank {rank} {how}, and with it the others: what it said stands above", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException:  # torchrun has passed it on and waited for its ranks
        return STOPPED
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
