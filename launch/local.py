"""Starts a recipe on several ranks of this machine, through torchrun.

    python -m launch.local ranks=2 -cn tiny parallel.tensor=2
    python -m launch.local ranks=2 restarts=3 -cn tiny
    python -m launch.local ranks=2 command=train.branch checkpoint=runs/x precision=bf16

The first is `torchrun --standalone --nproc-per-node 2 -m train -cn tiny parallel.tensor=2`, with one CPU thread per rank unless OMP_NUM_THREADS
says otherwise, but the recipe is validated for that many ranks before any of them starts, and a rank that ends badly is one sentence instead of
the launcher's traceback.

    ranks       default one per GPU, or 1
    restarts    how often all ranks are started again after one of them failed or died: each time they go on from the newest checkpoint; default 0
    command     train or train.branch; default train

Everything else is passed on to that command. A run that was refused (2), stopped on request (75) or interrupted (130) is not started again, which
torchrun's own --max-restarts, blind to statuses, would do.

The exit status is that of the rank that failed first, 128 + the signal where a signal ended it; otherwise as `train.signals` says.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from train.branching import branch
from train.recipe.cli import main as with_recipe
from train.recipe.tree import Recipe
from train.refusal import REFUSED, refuse
from train.signals import INTERRUPTED, STOPPED

PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # to the ranks; torchrun's own list lacks the last
FINAL = (0, REFUSED, STOPPED, INTERRUPTED)  # started again a run would end the same way, or was not to go on
# Commands that train, and what reads their command lines for a number of ranks.
READERS: Mapping[str, Callable[[Callable[[Recipe], int], Sequence[str], int], int]] = {
    "train": lambda note, arguments, ranks: with_recipe(note, "launch.local", arguments, ranks=ranks),
    "train.branch": lambda note, arguments, ranks: branch(arguments, note, ranks),
}


@dataclass(frozen=True)
class Wanted:
    """A command line. rest: the arguments of `command`, which runs on `ranks` and is started again at most `restarts` times."""

    ranks: int
    restarts: int
    command: str
    rest: tuple[str, ...]

    def torchrun(self) -> list[str]:
        """Its arguments."""
        line = ["--standalone", "--nproc-per-node", str(self.ranks), f"--signals-to-handle={PASSED_ON}"]
        return [*line, "-m", self.command, *self.rest]


def parse(arguments: Sequence[str]) -> Wanted:
    """Raises ValueError, in one sentence, for what cannot be."""
    own = {"ranks": str(max(torch.cuda.device_count(), 1)), "restarts": "0", "command": "train"}
    rest: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in own:
            own[key] = value
        else:
            rest.append(argument)
    ranks, restarts, command = own["ranks"], own["restarts"], own["command"]
    if not ranks.isdecimal() or int(ranks) < 1:
        raise ValueError(f"ranks={ranks} is no number of ranks: use for instance ranks=2")
    if not restarts.isdecimal():
        raise ValueError(f"restarts={restarts} is no number of restarts: use for instance restarts=3")
    if command not in READERS:
        raise ValueError(f"command={command} is none that trains: use one of {', '.join(READERS)}")
    if torch.cuda.is_available() and int(ranks) > torch.cuda.device_count():
        raise ValueError(f"ranks={ranks} exceeds the {torch.cuda.device_count()} GPUs of this machine: use one rank per GPU")
    if {"-m", "--multirun"} & set(rest):
        raise ValueError("-m is a sweep, whose jobs run one after the other on one rank each: use python -m train -m")
    return Wanted(int(ranks), int(restarts), command, tuple(rest))


def main(arguments: Sequence[str]) -> int:
    """Validates the recipe, starts the ranks and waits for them; returns the exit status."""
    try:
        wanted = parse(arguments)
    except ValueError as error:
        return refuse(str(error))
    validated: list[Recipe] = []

    def note(recipe: Recipe) -> int:
        validated.append(recipe)
        return 0

    status = READERS[wanted.command](note, wanted.rest, wanted.ranks)
    return _start(wanted) if validated else status


def _start(wanted: Wanted) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", PASSED_ON)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it would say of a failed rank follows below, shorter
    try:
        status = _once(wanted)
        for number in range(1, wanted.restarts + 1):
            if status in FINAL:
                break
            print(f"restart {number} of at most {wanted.restarts}: all ranks are started again", file=sys.stderr, flush=True)
            status = _once(wanted)
        return status
    except SignalException:  # torchrun has passed it on and waited for its ranks
        return STOPPED


def _once(wanted: Wanted) -> int:
    try:
        torchrun.run(torchrun.parse_args(wanted.torchrun()))
    except ChildFailedError as failed:
        # The launcher ends the others by SIGTERM, which it may note as early as what the first one did.
        own = {rank: failure for rank, failure in failed.failures.items() if failure.exitcode != -signal.SIGTERM}
        rank, failure = min((own or failed.failures).items(), key=lambda item: item[1].timestamp)
        if failure.exitcode not in FINAL:  # of those a sentence has been said
            how = (
                f"was ended by {signal.Signals(-failure.exitcode).name}"
                if failure.exitcode < 0
                else f"ended with status {failure.exitcode}"
            )
            print(f"error: rank {rank} {how}, and with it the others: what it said stands above", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
