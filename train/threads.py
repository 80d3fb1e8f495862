"""CPU threads of a rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_threads(wanted: int | None) -> Iterator[None]:
    """As train.threads or OMP_NUM_THREADS says; else several ranks on one machine share its cores."""
    before = torch.get_num_threads()
    if wanted is None and "OMP_NUM_THREADS" not in os.environ:
        wanted = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
