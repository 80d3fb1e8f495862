"""How the ranks that `srun python -m train` starts find each other: Slurm's variables under the names torchrun uses.

    SLURM_PROCID, SLURM_LOCALID               RANK, LOCAL_RANK
    SLURM_STEP_NUM_TASKS, SLURM_GTIDS         WORLD_SIZE, LOCAL_WORLD_SIZE (how many tasks stand on this node)
    SLURM_STEP_NODELIST, its first node       MASTER_ADDR
    SLURM_JOB_ID, SLURM_STEP_ID               MASTER_PORT, another one for each step

Only the tasks of a step are ranks. In a batch script, and in a shell of an allocation, SLURM_NTASKS says how many tasks there could be, but no
srun has started them: there this does nothing, nor where a launcher has set its own variables already. This file imports nothing heavy: it runs
before the imports that take seconds.
"""

import os
import re
import socket
import subprocess
from collections.abc import MutableMapping

FIRST_PORT, PORTS = 10000, 20000  # below the range from which systems hand out ports by themselves (32768 on Linux)
SPECIAL_STEPS = 4294967280  # ids from here up are Slurm's own: the batch script, the shell of an allocation, an external step
PORTS_OF_A_STEP = 7919  # how far apart the ports of two steps of a job lie: a prime, so that they differ


def adopt(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Sets torchrun's variables where this process is one of several tasks of a step; returns whether it did.

    MASTER_ADDR and MASTER_PORT are kept where they are set. Raises ValueError, in one sentence, for a step that cannot be a run.
    """
    step = environment.get("SLURM_STEP_ID", "")
    if "WORLD_SIZE" in environment or "RANK" in environment or not step.isdigit() or int(step) >= SPECIAL_STEPS:
        return False
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if tasks == "1":
        return False
    rank, local = environment["SLURM_PROCID"], environment["SLURM_LOCALID"]
    here = [int(number) for number in environment.get("SLURM_GTIDS", rank).split(",")]
    if here != list(range(int(rank) - int(local), int(rank) - int(local) + len(here))):
        raise ValueError(
            f"srun has put ranks {', '.join(map(str, here))} on one node, but those of a node must follow each other: use srun --distribution=block"
        )
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
        environment["MASTER_ADDR"] = _address(first_node(nodes))
    job = int(environment["SLURM_JOB_ID"])
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (job + PORTS_OF_A_STEP * int(step)) % PORTS))
    environment.update(RANK=rank, LOCAL_RANK=local, WORLD_SIZE=tasks, LOCAL_WORLD_SIZE=str(len(here)))
    return True


def first_node(nodes: str) -> str:
    """Of Slurm's way to write a list: `gpu[003-017,020]-ib,login1` -> `gpu003-ib`. Raises ValueError for what is no list."""
    first = re.match(r"(?:[^\[\],\s]|\[[\d,-]+\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no node: set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", first.group())


def _address(node: str) -> str:
    """Of a node: its name where that is one of a host, or what Slurm itself reaches it by."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", "-o", node], capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    if found is None:
        raise ValueError(
            f"the first node of this step, {node}, has no address that can be looked up: set MASTER_ADDR to the host of rank 0"
        )
    return found.group(1)
