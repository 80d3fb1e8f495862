"""How the ranks of a job find each other, each time anew: a roll call, after which every rank holds the same fresh corner of the store.

A launcher that restarts its ranks (torchrun --max-restarts, or another node that comes or goes) keeps its store, in which the ranks before have
left the addresses they listened on; torch reads those as if they were new. So rank 0 makes up a name for this start. Every other rank greets it
with a word of its own, and hears the name in answer to that word, which no earlier rank can have left. When all have answered, all begin.
"""

import os
import time
import uuid
from datetime import timedelta

import psutil
import torch.distributed as dist

LOOK = 0.05  # seconds between two looks into the store


class NotMet(RuntimeError):
    """Some ranks did not come; the message is a sentence that names them. told_here: this rank says so, and not another that knows the same."""

    def __init__(self, message: str, told_here: bool = True) -> None:
        super().__init__(message)
        self.told_here = told_here


def meet(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store of this start, once all ranks have come. MASTER_ADDR and MASTER_PORT say where. Raises NotMet."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(address, port, is_master=hosts, wait_for_workers=False, multi_tenant=True, timeout=timeout)
    except dist.DistError as error:
        raise NotMet(
            f"nobody answers at {address}:{port}, where the ranks meet ({_first(error)}): rank 0, or its launcher, did not come"
        ) from None
    call = _call if rank == 0 else _answer
    return dist.PrefixStore(call(store, rank, world_size, timeout), store)


def _call(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Rank 0: answers every greeting until every rank has answered the roll."""
    name = f"start/{uuid.uuid4().hex}"
    absent, answered = set(range(1, world_size)), dict[int, bytes]()
    deadline = time.monotonic() + timeout.total_seconds()
    while absent and time.monotonic() < deadline:
        for other in sorted(absent):
            if store.check([f"{name}/here/{other}"]):
                absent.discard(other)
            elif store.check([f"greeting/{other}"]):
                greeting = store.get(f"greeting/{other}")
                if answered.get(other) != greeting:
                    store.set(f"answer/{greeting.decode()}", name)
                    answered[other] = greeting
        if absent:
            time.sleep(LOOK)
    trouble = _absence(sorted(absent), timeout) if absent else ""
    store.set(f"{name}/begin", trouble)
    if trouble:
        raise NotMet(trouble)
    return name


def _answer(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    greeting, begun = uuid.uuid4().hex, time.monotonic()
    store.set(f"greeting/{rank}", greeting)
    try:
        store.wait([f"answer/{greeting}"], timeout)
        name = store.get(f"answer/{greeting}").decode()
        store.set(f"{name}/here/{rank}", "")
        # Rank 0 names those that are absent when its time is over, which began at about the same time as ours.
        store.wait([f"{name}/begin"], timeout + timedelta(seconds=5))
        trouble = store.get(f"{name}/begin").decode()
    except dist.DistError as error:
        minutes = (time.monotonic() - begun) / 60
        raise NotMet(f"{_absence([0], timeout)} (rank {rank} waited {minutes:.2g} minutes: {_first(error)})") from None
    if trouble:
        raise NotMet(trouble, told_here=False)
    return name


def _absence(absent: list[int], timeout: timedelta) -> str:
    shown = ", ".join(map(str, absent[:16])) + (f" and {len(absent) - 16} more" if len(absent) > 16 else "")
    minutes = timeout.total_seconds() / 60
    states = "".join(f"; {state}" for rank in absent[:16] if (state := _state_here(rank)))
    return f"rank{'s' * (len(absent) > 1)} {shown} did not come to the start within parallel.timeout_minutes={minutes:g}{states}"


def _state_here(rank: int) -> str:
    """What the launcher's process of that rank does, when it is one of this machine."""
    try:
        for process in psutil.Process(os.getppid()).children():
            if process.environ().get("RANK") == str(rank):
                return f"rank {rank} is process {process.pid} on this host, {process.status()}"
    except psutil.Error:
        pass
    return ""


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
