"""The run: the typed recipe, the loop, optimizer and schedule, checkpoints, evaluation, observers and export."""

import os

# Read by GNU OpenMP when torch is first imported. After a GEMM its threads keep a core busy, waiting for the next one: by default for some
# milliseconds, which the threads that quantise would then have to share. 10,000 turns are about as long as small operations lie apart.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
