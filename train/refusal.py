"""A command that cannot go on says why in one sentence, once, on however many ranks it was started."""

import datetime
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from train.observe.redact import redacted

REFUSED = 2  # exit status of a command whose arguments or recipe are wrong
PATIENCE = datetime.timedelta(seconds=5)


def refuse(message: str) -> int:
    """Prints `error: message`, without secrets, unless another rank has said the same; returns the exit status.

    Ranks started by torchrun agree through its store, which is there before any process group. Without it, rank 0 speaks as it is, and any other
    rank with its name.
    """
    message = redacted(message)
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    said = False
    if world != "1":
        leave_for_launcher(f"error: {message}")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            said = _already_said(message)
        elif rank != "0":
            message = f"rank {rank}: {message}"
    if not said:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return REFUSED


def _already_said(message: str) -> bool:
    key = f"refused/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)
        return store.add(key, 1) > 1
    except RuntimeError:  # the launcher is gone: better twice than never
        return False


def leave_for_launcher(message: str) -> None:
    """torchrun sums up what ended its ranks from a file of each."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        Path(path).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))
