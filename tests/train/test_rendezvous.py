"""Ranks of a step of Slurm find each other; whatever is no step is left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runbook import told
from train.rendezvous import adopt, first_node

# As a real `srun` of 4 tasks on 2 nodes sets them, for its third task.
STEP = {
    "SLURM_JOB_ID": "41235", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1", "SLURM_GTIDS": "2,3", "SLURM_JOB_NODELIST": "localhost,n[1-4]", "SLURM_STEP_NODELIST": "localhost,n1",
}  # fmt: skip
# As its batch script sees them: a process id of its own, and no step.
BATCH = {"SLURM_JOB_ID": "41235", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n[0-1]"}


def test_a_task_of_a_step_is_a_rank() -> None:
    environment = dict(STEP)
    assert adopt(environment)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [environment[name] for name in names] == ["2", "0", "4", "2", "localhost"]
    others = dict(STEP, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_GTIDS="0,1", SLURM_NODEID="0")
    adopt(others)
    assert others["MASTER_PORT"] == environment["MASTER_PORT"]  # the ranks of a step agree
    beside = dict(STEP, SLURM_STEP_ID="3")
    adopt(beside)
    assert beside["MASTER_PORT"] != environment["MASTER_PORT"]  # and two steps do not collide
    assert all(10000 <= int(e["MASTER_PORT"]) < 32768 for e in (environment, beside))


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,
        {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4"},  # the shell that salloc opens on a node
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1 --pty bash in a larger allocation
        {**STEP, "WORLD_SIZE": "2", "RANK": "1"},  # torchrun below srun
    ],
    ids=["no Slurm", "batch script", "salloc", "srun of one task", "torchrun below srun"],
)
def test_what_is_no_rank_is_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    assert not adopt(environment)
    assert environment == before


def test_an_address_that_is_given_is_kept() -> None:
    environment = {**STEP, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    assert adopt(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.7", "29500")


def test_steps_that_cannot_be_a_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks 1, 3 on one node.*--distribution=block") as scattered:
        adopt({**STEP, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_GTIDS": "1,3"})
    with pytest.raises(ValueError, match=r"no-such-host\.invalid, has no address") as nameless:
        adopt({**STEP, "SLURM_STEP_NODELIST": "no-such-host.invalid"})
    told("Ranks started one by one", f"error: {scattered.value}", "--distribution=block")
    told("Ranks started one by one", f"error: {nameless.value}", "has no address")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n[0-1]", "n0"), ("n7", "n7"), ("gpu[003-017,020]-ib,login1", "gpu003-ib"), ("rack[1-2]n[04,06]", "rack1n04"), ("a,b[1-2]", "a")],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_no_list_of_nodes_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST='' names no node: set MASTER_ADDR"):
        first_node("")


def test_world_size_alone_starts_no_runs_of_one_rank(tmp_path: Path) -> None:
    """The command itself: what an `srun --export=WORLD_SIZE` or a template of another launcher leaves set."""
    line = [sys.executable, "-m", "train", "-cn", "tiny", f"run.dir={tmp_path / 'run'}"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(line, cwd=root, env={"PATH": "/bin", "WORLD_SIZE": "4"}, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.count("\n") == 1
    told("Ranks started one by one", done.stderr, "WORLD_SIZE=4")
