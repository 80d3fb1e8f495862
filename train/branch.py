"""Forks a run at a checkpoint under another precision, or any other change that leaves its data alone.

    python -m train.branch checkpoint=runs/x/checkpoints/step-00000240 precision=bf16
    python -m train.branch checkpoint=runs/x branch=[bf16,fp32] every=240steps   # a sweep: each of these precisions at each of these checkpoints

The branch continues weights, optimizer, expert biases and data exactly where the parent stood, by the parent's recipe with these overrides, in
a directory of its own (default: RUN-step-N-OVERRIDES beside the parent's). Under the parent's own recipe it is, bit for bit, the parent's
continuation, so what differs afterwards is due to the overrides alone. It is a command like `python -m train`: the same line again continues
a branch, and torchrun starts it on several ranks.
"""

import sys

from train.command import guarded


def main() -> int:
    """Returns the exit status (see `train.signals`)."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0

    def start() -> int:
        from train.branching import branch  # here: the imports take seconds, in which a signal may arrive

        return branch(sys.argv[1:])

    return guarded(start)


if __name__ == "__main__":
    raise SystemExit(main())
