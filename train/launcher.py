"""A rank ends with the launcher that started it.

torchrun ends its ranks when it is asked to stop, but when it is killed they live on, in sessions of their own, and may write into a run
directory beside the job that was started in their place. A thread looks after the parent process; Linux could do it (PR_SET_PDEATHSIG), but
asks for the parent *thread*, and says nothing.
"""

import os
import threading
import time

INTERVAL = 0.5  # seconds


def end_with_launcher() -> None:
    """Ends this process within a second of the death of the torchrun that started it; does nothing in a process that torchrun did not start
    (a shell may well end before what it started)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(INTERVAL)
    line = f"error: rank {os.environ.get('RANK')} ends, because the launcher that started it (process {launcher}) is gone\n"
    try:
        os.write(2, line.encode())
    finally:
        os._exit(1)
