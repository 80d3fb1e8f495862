"""Starts a recipe on several ranks of this machine, through torchrun.

    python -m launch.local ranks=2 -cn tiny parallel.tensor=2

is `torchrun --standalone --nproc-per-node 2 -m train -cn tiny parallel.tensor=2`, with one CPU thread per rank unless OMP_NUM_THREADS says
otherwise. ranks: default one per GPU, or 1. Everything else is passed on to `python -m train`.
"""

import os
import sys
from collections.abc import Sequence

import torch


def command(arguments: Sequence[str]) -> list[str]:
    """The torchrun command line. Raises ValueError, in one sentence, for a number of ranks that cannot be."""
    given = [argument for argument in arguments if argument.startswith("ranks=")]
    rest = [argument for argument in arguments if not argument.startswith("ranks=")]
    ranks = given[-1].removeprefix("ranks=") if given else str(max(torch.cuda.device_count(), 1))
    if not ranks.isdigit() or int(ranks) < 1:
        raise ValueError(f"ranks={ranks} is no number of ranks: use for instance ranks=2")
    if torch.cuda.is_available() and int(ranks) > torch.cuda.device_count():
        raise ValueError(f"ranks={ranks} exceeds the {torch.cuda.device_count()} GPUs of this machine: use one rank per GPU")
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m", "train", *rest]


def main(arguments: Sequence[str]) -> int:
    """Replaces this process by torchrun; exit status 2 for wrong arguments."""
    try:
        line = command(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.execv(line[0], line)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
