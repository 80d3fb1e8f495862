"""Looks at the nodes of a job before it trains, and stops it with one sentence for each that is unfit.

    srun python -m launch.preflight -cn tiny        # or torchrun ... -m launch.preflight; the arguments are those of the training

Every rank says what it is, how fast it multiplies, whether it can read the data and write into the run directory, and what time it is; then nodes
reduce data with each other in a tournament of pairs (`launch.meetings`). Thresholds are the keys of `cluster.preflight`, `launch.judge` applies
them. What was measured is kept in <run>/preflight.json. Exit status: 0 all nodes are fit, 1 some is not, 2 the recipe is wrong.
"""

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.desk import Desk, Unfit
from launch.judge import Meeting, Report, findings, slow_meetings
from launch.measure import disk, free_device_memory, free_host_memory, matrix_flops, node, unreadable, versions
from launch.meetings import hold
from train.recipe.cli import main as with_recipe
from train.recipe.tree import Recipe
from train.refusal import refuse
from train.rendezvous import adopt
from train.threads import cpu_threads

FILE_NAME = "preflight.json"
PINGS = 5  # of which the quickest tells the difference of two clocks


def main(arguments: Sequence[str]) -> int:
    """The command."""
    try:
        adopt()
    except ValueError as error:
        return refuse(str(error))
    return with_recipe(examine, "launch.preflight", arguments)


def examine(recipe: Recipe) -> int:
    """On every rank; returns the exit status."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    patience, begin = recipe.cluster.preflight.patience_seconds, time.monotonic()
    try:
        store = _store(rank, world, patience)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        why = f"cannot listen there ({str(error).splitlines()[0]})" if rank == 0 else f"did not come within {patience:g} s"
        print(f"error: rank 0 of {where} {why}", file=sys.stderr, flush=True)
        return 1
    desk = Desk(store, rank, world, patience, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ)
    sentences: list[str] = []
    reports: list[Report] = []
    meetings: list[Meeting] = []
    try:
        with cpu_threads(recipe.train.threads):
            reports = _reports(recipe, desk)
            meetings = _meetings(recipe, desk, reports)
    except Unfit as unfit:
        sentences = list(unfit.args)
        if rank == 0:
            print("\n".join(f"error: {sentence}" for sentence in sentences), file=sys.stderr, flush=True)
        desk.leave()
        _keep(recipe, rank, reports, meetings, sentences)
        return 1
    desk.leave()
    _keep(recipe, rank, reports, meetings, sentences)
    if rank == 0:
        print(_summary(reports, meetings, time.monotonic() - begin), flush=True)
    return 0


def _store(rank: int, world: int, patience: float) -> dist.Store | None:
    if world == 1:
        return None
    address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), datetime.timedelta(seconds=patience)
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which is there already
    store = dist.TCPStore(address, port, is_master=rank == 0 and not shared, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _reports(recipe: Recipe, desk: Desk) -> list[Report]:
    """Of all ranks, fit ones. Raises Unfit."""
    config = recipe.cluster.preflight
    desk.ask("come", node())
    # Whoever asks nothing of the disk (0 bytes per second) does not wait for a rank that hangs until the disk might have written.
    writing = config.disk_bytes / max(config.disk_bytes_per_second, 1.0)
    longer = config.gemm_seconds + min(writing, config.patience_seconds)
    given = desk.ask("examination", asdict(_report(recipe, desk)), longer=longer)
    reports = [Report(**{**answer, "disk": tuple(answer["disk"]) if answer["disk"] else None}) for answer in given]
    first = {report.node: report.rank for report in reversed(reports)}
    clocks = _clocks(desk, sorted(set(first.values()) - {0}))
    reports = [replace(report, clock=clocks.get(report.rank)) for report in reports]
    desk.ask("judgement", None, lambda _: findings(reports, config))
    return reports


def _report(recipe: Recipe, desk: Desk) -> Report:
    """What this rank finds of itself; an error is one of its findings."""
    config, first_here = recipe.cluster.preflight, os.environ.get("LOCAL_RANK", "0") == "0"
    report = Report(desk.rank, node(), ranks_here=desk.ranks_here)
    try:
        devices = torch.cuda.device_count()
        report = replace(report, devices=devices, host_memory=free_host_memory(), versions=versions())
        device = _device()
        report = replace(report, memory=free_device_memory(device))
        if first_here:
            report = replace(report, unreadable=unreadable(recipe.data), disk=disk(Path(recipe.run_dir), config.disk_bytes))
        return replace(report, flops=matrix_flops(device, config.gemm_seconds))
    except Exception as error:  # whatever a broken node raises is what is to be told
        return replace(report, error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _clocks(desk: Desk, leaders: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Seconds by which the clocks of these ranks are ahead of rank 0's, and how far each may be wrong: half the way there and back."""
    store, patience = desk.store, datetime.timedelta(seconds=desk.patience)
    found: dict[int, tuple[float, float]] = {}
    if store is None or (desk.rank and desk.rank not in leaders):
        return found
    try:
        for rank in leaders if desk.rank == 0 else [desk.rank]:
            for ping in range(PINGS):
                key = f"clock/{rank}/{ping}"
                if desk.rank:
                    store.wait([f"{key}/ask"], patience * (1 + len(leaders)))
                    store.set(f"{key}/time", repr(time.time()))
                    continue
                asked = time.time()
                store.set(f"{key}/ask", "")
                store.wait([f"{key}/time"], patience)
                answered = time.time()
                difference, doubt = float(store.get(f"{key}/time")) - (asked + answered) / 2, (answered - asked) / 2
                if ping == 0 or doubt < found[rank][1]:
                    found[rank] = (difference, doubt)
    except (dist.DistStoreError, dist.DistNetworkError):
        pass  # who is silent is found by the next question
    return found


def _meetings(recipe: Recipe, desk: Desk, reports: Sequence[Report]) -> list[Meeting]:
    """Between all nodes, fit ones. Raises Unfit."""
    config, nodes = recipe.cluster.preflight, [report.node for report in reports]
    order, mine, broken = list(dict.fromkeys(nodes)), [], ""
    if desk.store is not None and len(order) > 1:
        try:
            mine = hold(desk.store, nodes, desk.rank, _device(), config)
        except (RuntimeError, dist.DistError) as error:
            broken = (str(error).splitlines() or ["?"])[0]

    def judge(answers: list[Any]) -> list[str]:
        lost = [f"node {nodes[rank]} (rank {rank}) could not meet the others: {text}" for rank, (_, text) in enumerate(answers) if text]
        return lost or slow_meetings(_slowest(answers, order), config)

    return _slowest(desk.ask("meetings", (mine, broken), judge, longer=config.bandwidth_seconds), order)


def _slowest(answers: Sequence[Any], order: Sequence[str]) -> list[Meeting]:
    """Of each pair of nodes the slowest pair of ranks."""
    speeds: dict[tuple[int, int], float] = {}
    for met, _ in answers:
        for first, second, speed in met:
            speeds[first, second] = min(speed, speeds.get((first, second), speed))
    return [Meeting((order[first], order[second]), speed) for (first, second), speed in sorted(speeds.items())]


def _keep(recipe: Recipe, rank: int, reports: Sequence[Report], meetings: Sequence[Meeting], sentences: Sequence[str]) -> None:
    if rank:
        return
    told = {"unfit": list(sentences), "ranks": [asdict(report) for report in reports], "meetings": [asdict(one) for one in meetings]}
    path = Path(recipe.run_dir) / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told, indent=1) + "\n")
    except OSError as error:
        print(f"error: {path} cannot be written ({error})", file=sys.stderr, flush=True)


def _summary(reports: Sequence[Report], meetings: Sequence[Meeting], seconds: float) -> str:
    nodes = len({report.node for report in reports})
    parts = [f"preflight: {nodes} node{'s' * (nodes > 1)}, {len(reports)} rank{'s' * (len(reports) > 1)} fit"]
    figures: tuple[tuple[str, str, Callable[[], list[float]]], ...] = (
        ("GEMM", "GFLOP/s", lambda: [report.flops / 1e9 for report in reports if report.flops]),
        ("all-reduce of two nodes", "MB/s", lambda: [meeting.bytes_per_second / 1e6 for meeting in meetings]),
        ("disk", "MB/s", lambda: [report.disk[0] / 1e6 for report in reports if report.disk]),
    )
    for name, unit, values in figures:
        if found := values():
            parts.append(f"{name} {min(found):,.0f} to {max(found):,.0f} {unit}")
    return "; ".join(parts) + f"; {seconds:.1f} s"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
