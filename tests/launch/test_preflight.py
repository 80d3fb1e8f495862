"""A preflight names the node that is unfit, and why: judged on made-up reports, and found on real ranks of which one is really slowed or stopped."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from launch import measure
from launch.judge import Meeting, Report, findings, rounds, slow_meetings
from launch.preflight import examine
from parallel import groups
from parallel.preflight import PreflightConfig
from tests.runbook import told
from train.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
CONFIG = PreflightConfig()
FIT = Report(0, "n0", devices=2, ranks_here=2, versions={"torch": "2.13.0", "code": "abc"}, memory=0.99, host_memory=10**11, flops=1e12,
             clock=(0.1, 0.0), disk=(1e8, 10**12))  # fmt: skip


def four(**of_the_last: object) -> list[Report]:
    reports = [replace(FIT, rank=rank, node=f"n{rank // 2}", flops=1e12 + rank) for rank in range(4)]
    return [*reports[:3], replace(reports[3], **of_the_last)]  # type: ignore[arg-type]


def test_fit_nodes() -> None:
    assert findings(four(), CONFIG) == []


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"flops": 0.7e12}, "node n1 (rank 3) multiplies matrices at 700.0 GFLOP/s, 70% of the median 1,000.0"),
        ({"devices": 1}, "node n1 shows 1 devices, but 2 ranks stand on it"),
        ({"memory": 0.5}, "node n1 (rank 3) has 50% of its device's memory free"),
        ({"host_memory": 10**8}, "node n1 has 0.1 GB of memory free"),
        ({"clock": (-7.0, 0.5)}, "node n1's clock is 7.0 s behind the first node's"),
        ({"disk": (1e6, 10**12)}, "node n1 writes 1.0 MB/s into the run directory"),
        ({"disk": (1e8, 10**8)}, "node n1 has 0.1 GB free for the run directory"),
        ({"unreadable": "no /data"}, "node n1 cannot read the data: no /data"),
        ({"versions": {"torch": "2.12.0", "code": "abc"}}, "node n1 has torch 2.12.0, but most have 2.13.0"),
        ({"versions": {"torch": "2.13.0"}}, "node n1 has code none, but most have abc"),
        ({"error": "RuntimeError: CUDA error", "flops": None}, "node n1 (rank 3) could not be examined: RuntimeError: CUDA error"),
    ],
)
def test_what_is_unfit_is_one_sentence_with_the_node(wrong: dict[str, object], sentence: str) -> None:
    found = findings(four(**wrong), CONFIG)
    assert len(found) == 1 and found[0].startswith(sentence) and "\n" not in found[0], found


def test_what_cannot_be_told_is_not_held_against_a_node() -> None:
    assert findings(four(clock=(3.0, 1.5)), CONFIG) == []  # the way there and back took 3 s
    assert findings([replace(FIT, rank=0), replace(FIT, rank=1, node="n1", versions={"torch": "2.12.0", "code": "abc"})], CONFIG) == [
        "node n1 has torch 2.12.0, but most have 2.13.0: all nodes must run the same"
    ]  # of two, the first is right


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 16])
def test_in_a_tournament_each_meets_each_once_and_nobody_two_at_a_time(nodes: int) -> None:
    played = rounds(nodes)
    assert len(played) == nodes - 1 + nodes % 2
    for pairs in played:
        seats = [node for pair in pairs for node in pair]
        assert len(seats) == len(set(seats)) and len(pairs) == nodes // 2
    assert sorted(pair for pairs in played for pair in pairs) == [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]


def test_a_slow_node_and_a_slow_pair() -> None:
    def met(speed: Callable[[int, int], float]) -> list[Meeting]:
        return [Meeting((f"n{a}", f"n{b}"), speed(a, b)) for a in range(5) for b in range(a + 1, 5)]

    assert slow_meetings(met(lambda a, b: 1e9 + a), CONFIG) == []
    (node,) = slow_meetings(met(lambda a, b: 2e8 if 3 in (a, b) else 1e9), CONFIG)
    assert node.startswith("node n3 reduces 200 MB/s with others, 20% of the median 1,000")
    (pair,) = slow_meetings(met(lambda a, b: 2e8 if (a, b) == (1, 4) else 1e9), CONFIG)
    told("The preflight stops a job", f"error: {pair}", "between them")
    assert slow_meetings([], CONFIG) == []


# -- on ranks of the pool ------------------------------------------------------------------------------------------------------------------


def examined(rank: int, port: int, run_dir: str, lags: int) -> tuple[int, str]:
    """A preflight as one of two ranks, each a node of its own; rank 1 multiplies `lags` times slower. What it printed."""
    groups.shutdown()  # the pool's process group; a preflight opens its own
    os.environ |= {"MASTER_PORT": str(port), "SLURMD_NODENAME": f"n{rank}", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    quick = [
        f"cluster.preflight.{key}" for key in ("disk_bytes=100000", "bandwidth_bytes=100000", "gemm_seconds=0.05", "bandwidth_share=0.001")
    ]
    recipe = load_recipe("tiny", "cluster=cpu", f"run.dir={run_dir}", "cluster.preflight.disk_bytes_per_second=1000", *quick, world_size=2)
    measure.SIDES["cpu"] = 64
    printed = io.StringIO()
    product = measure.timed_product
    if lags > 1 and rank == 1:
        measure.timed_product = lambda a, b: sum(product(a, b) for _ in range(lags))
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = examine(recipe)
    finally:
        measure.timed_product, measure.SIDES["cpu"] = product, 512
        del os.environ["SLURMD_NODENAME"]
    return status, printed.getvalue()


def test_two_nodes_of_the_pool(ranks: Callable[[int], Callable[..., list[tuple[int, str]]]], tmp_path: Path) -> None:
    (status, printed), (other, silent) = ranks(2)(examined, free_port(), str(tmp_path / "fit"), 1)
    assert (status, other, silent) == (0, 0, "") and printed.startswith("preflight: 2 nodes, 2 ranks fit; GEMM "), printed
    kept = json.loads((tmp_path / "fit/preflight.json").read_text())
    assert kept["unfit"] == [] and kept["meetings"][0]["nodes"] == ["n0", "n1"] and kept["ranks"][1]["clock"][0] == pytest.approx(0, abs=1)
    (status, printed), (other, silent) = ranks(2)(examined, free_port(), str(tmp_path / "slow"), 100)
    assert (status, other, silent) == (1, 1, "")
    told("The preflight stops a job", printed, "multiplies matrices")
    assert json.loads((tmp_path / "slow/preflight.json").read_text())["unfit"] == [printed.strip().removeprefix("error: ")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# -- on real ranks, as many "nodes" as SLURMD_NODENAME says --------------------------------------------------------------------------------


@contextmanager
def job(
    tmp_path: Path, *overrides: str, ranks: int = 4, tree: dict[int, Path] | None = None, without: int | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks on nodes n0, n1 ... with two each, started as srun starts them."""
    port = str(free_port())
    started = []
    quick = (
        "cluster=cpu",
        "cluster.preflight.disk_bytes=1000000",
        "cluster.preflight.bandwidth_bytes=1000000",
        "cluster.preflight.gemm_seconds=0.5",
    )
    loose = ("cluster.preflight.gemm_share=0.01", "cluster.preflight.bandwidth_share=0.001", "cluster.preflight.disk_bytes_per_second=1000")
    for rank in range(ranks):
        if rank == without:
            continue
        node = rank // 2
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))},
            "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % 2), "SLURM_GTIDS": f"{2 * node},{2 * node + 1}", "SLURM_STEP_NODELIST": "localhost",
            "SLURMD_NODENAME": f"n{node}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str((tree or {}).get(rank, ROOT)),
        }  # fmt: skip
        line = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "launch.preflight",
            "-cn",
            "tiny",
            f"run.dir={tmp_path / 'run'}",
            *quick,
            *loose,
            *overrides,
        ]
        started.append(
            subprocess.Popen(
                line, cwd=(tree or {}).get(rank, ROOT), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def ended(ranks: list[subprocess.Popen[str]], timeout: float = 280) -> tuple[list[int], str, list[str]]:
    """Statuses, what rank 0 printed, and all errors; PyTorch's sockets warn of their own of a wait that was long."""
    said = [process.communicate(timeout=timeout) for process in ranks]
    errors = [line for _, text in said for line in text.splitlines() if not line.startswith("[W")]
    return [process.returncode for process in ranks], said[0][0], errors


@pytest.mark.slow
def test_two_fit_nodes(tmp_path: Path) -> None:
    with job(tmp_path) as ranks:
        statuses, printed, errors = ended(ranks)
    assert statuses == [0, 0, 0, 0] and errors == []
    assert printed.startswith("preflight: 2 nodes, 4 ranks fit; GEMM ") and printed.count("\n") == 1
    kept = json.loads((tmp_path / "run/preflight.json").read_text())
    assert kept["unfit"] == [] and len(kept["ranks"]) == 4 and kept["meetings"][0]["nodes"] == ["n0", "n1"]
    assert kept["ranks"][2]["clock"][0] == pytest.approx(0, abs=1)  # one machine, one clock


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    with job(tmp_path, "cluster.preflight.patience_seconds=90", without=3) as ranks:
        statuses, _, errors = ended(ranks)
    assert statuses == [1, 1, 1] and errors == ["error: node n1 (rank 3) gave no answer (come) within 90 s"]
    told("The preflight stops a job", errors[0], "gave no answer")
    assert json.loads((tmp_path / "run/preflight.json").read_text())["unfit"]


@pytest.mark.slow
def test_a_rank_that_is_really_slow_is_named(tmp_path: Path) -> None:
    """Rank 2 is stopped four fifths of the time, as a throttled machine would be."""
    slow = ("cluster.preflight.gemm_share=0.5", "cluster.preflight.gemm_seconds=4")
    with job(tmp_path, *slow) as ranks:
        over = threading.Event()

        def throttle() -> None:
            while not over.is_set() and ranks[2].poll() is None:
                ranks[2].send_signal(signal.SIGSTOP)
                time.sleep(0.04)
                ranks[2].send_signal(signal.SIGCONT)
                time.sleep(0.01)

        thread = threading.Thread(target=throttle)
        thread.start()
        try:
            statuses, _, errors = ended(ranks)
        finally:
            over.set()
            thread.join()
    assert statuses == [1, 1, 1, 1]
    assert any(line.startswith("error: node n1 (rank 2) multiplies matrices at") for line in errors), errors


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    """Stopped for good while it multiplies."""
    with job(tmp_path, "cluster.preflight.patience_seconds=15", "cluster.preflight.gemm_seconds=15") as ranks:
        while not (tmp_path / "run").exists():  # it has come, and writes to the disk
            time.sleep(0.05)
        time.sleep(4)
        ranks[3].send_signal(signal.SIGSTOP)
        statuses, _, errors = ended(ranks[:3])
        assert statuses == [1, 1, 1]
        assert len(errors) == 1 and errors[0].startswith("error: node n1 (rank 3) gave no answer (examination) within"), errors


@pytest.mark.slow
def test_a_node_with_other_code_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for room in ("train", "model", "parallel", "data", "launch", "recipes"):
        shutil.copytree(ROOT / room, other / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "train/step.py").open("a") as file:
        file.write("# changed on this node only\n")
    with job(tmp_path, tree={2: other, 3: other}) as ranks:
        statuses, _, errors = ended(ranks)
    assert statuses == [1, 1, 1, 1]
    assert errors and all(line.startswith("error: node n1 has code ") for line in errors), errors
    told("The preflight stops a job", errors[0], "has code")
