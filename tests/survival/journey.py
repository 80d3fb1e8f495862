"""The life of one run that is killed again and again, and what must be true of it in the end."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

from tests.survival.moments import Blow, Moment, deck, draw
from tests.train.numbers import numbers_in
from tests.train.recipes import SMALL
from train.checkpoint.reader import Checkpoint, latest
from train.observe.metrics import FILE_NAME, decode_lines

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).parent / "probe"
STEPS = 12
EVERY = 2
GIVEN = (
    f"train.steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "train.eval_every=3",
    "train.log_every=1",
    "monitor.quantization.every=2",
    "data.validation_fraction=0.0005",
)
"""What makes a run short, and measures and saves often."""
BARE = ("monitor.wandb=disabled", "monitor.picture=false")
"""The shipped `tiny` without W&B and pictures, as are most here, whose processes take longest to start."""
LITTLE = tuple(
    value for value in SMALL if not value.startswith(("train.steps", "train.log", "train.eval", "checkpoint", "data", "optimizer"))
)
"""`tiny` with every kind of layer in a few milliseconds a step, without W&B and pictures; the formats are the same."""
PATIENCE = 400.0  # seconds a start may take
LEAVE = 30.0  # seconds in which every process of a start that was killed is gone


@dataclass(frozen=True)
class Kind:
    """A command: how many ranks, by which launcher, with which overrides; kinds of one name have the same numbers."""

    name: str
    ranks: int
    launcher: str = "python"
    overrides: tuple[str, ...] = ()

    def command(self, *overrides: str) -> list[str]:
        """The documented one."""
        start = {
            "python": ["-m", "train"],
            "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks), "-m", "train"],
            "local": ["-m", "launch.local", f"ranks={self.ranks}"],
        }[self.launcher]
        return [sys.executable, "-W", "ignore", *start, "-cn", "tiny", *GIVEN, *self.overrides, *overrides]


KINDS = (
    Kind("tiny, 1 rank", 1),
    Kind("data 2", 2, "torchrun", (*LITTLE, "parallel.distributed_optimizer=true")),
    Kind("1 rank", 1, "python", LITTLE),
    Kind("tensor 2 x expert 2", 4, "torchrun", (*BARE, "parallel.tensor=2", "parallel.expert=2")),
    Kind("tiny, 1 rank", 1, "python", ("checkpoint.asynchronous=false",)),
    Kind("tensor 2", 2, "local", (*BARE, "parallel.tensor=2")),
    Kind("1 rank", 1, "python", LITTLE),
    Kind("pipeline 2", 2, "torchrun", (*LITTLE, "parallel.pipeline=2")),
    Kind("data 4", 4, "local", (*LITTLE, "parallel.distributed_optimizer=true")),
)
"""Journeys go through these, one after the other."""


@dataclass
class Result:
    """Of one kill. began: the step from which the next start went on; before, after: the newest valid checkpoint before and after the kill."""

    seed: int
    journey: int
    kind: str
    ranks: int
    start: int
    moment: str
    victims: str
    rank: int
    trigger: dict[str, Any]
    struck: bool
    before: int
    after: int
    status: int
    began: int | None = None
    identical: bool = False
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Start:
    """One start of the command, until all its processes are gone."""

    status: int
    output: str


def run_once(kind: Kind, place: Path, run_dir: Path, number: int, blow: Blow | None, *overrides: str) -> Start:
    """Starts the command and waits for its end, however it comes."""
    kill = None if blow is None else {**blow.trigger, "rank": blow.rank, "victims": blow.victims}
    if kill and kill.get("partial"):
        kill["partial"] = str(run_dir / "checkpoints")
    if kill and kill.get("torn"):
        kill["torn"] = str(run_dir / FILE_NAME)
    order = json.dumps({"place": str(place), "start": number, "kill": kill})
    paths = (str(PROBE), str(ROOT), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), "SURVIVAL": order}
    log = place / f"output-{number}.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            kind.command(f"run.dir={run_dir}", f"data.cache={place.parent / 'cache'}", *overrides),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        status = process.wait(PATIENCE)
        left = _wait_until_gone(order)
    except subprocess.TimeoutExpired:
        status, left = 999, [*_ours(order)]
    for one in left:
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait()
    text = log.read_text(errors="replace")
    if status == 999:
        text += f"\nstill running after {PATIENCE:g} s"
    elif left:
        status, text = 998, text + f"\nleft behind: {[one.pid for one in left]}"
    return Start(status, text)


def _ours(order: str) -> Iterator[psutil.Process]:
    """Every process of this start, helpers of helpers too: they inherit its environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SURVIVAL") == order and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _wait_until_gone(order: str) -> list[psutil.Process]:
    end = time.monotonic() + LEAVE
    while left := list(_ours(order)):
        if time.monotonic() > end:
            return left
        time.sleep(0.1)
    return []


# -- what is compared ----------------------------------------------------------------------------------------------------------------------


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without times, in the order of the file."""
    path = run_dir / FILE_NAME
    lines = decode_lines(path.read_bytes()) if path.exists() else []
    return [numbers_in(line) for line in lines]


def same(ours: Any, theirs: Any) -> bool:
    """Bit for bit; a NaN is itself."""
    return ours == theirs or (ours != ours and theirs != theirs)


def differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], whole: bool) -> list[str]:
    """whole: `ours` has everything; otherwise it is a beginning, whose last lines may still lack their evaluation."""
    problems = []
    steps = [line["step"] for line in ours]
    if steps != list(range(1, len(steps) + 1)):
        problems.append(f"metrics.jsonl has the steps {steps}")
    if whole and len(ours) != len(theirs):
        problems.append(f"metrics.jsonl has {len(ours)} lines instead of {len(theirs)}")
    expected = {line["step"]: line for line in theirs}
    for line in ours:
        there = expected.get(line["step"], {})
        wrong = [key for key in line if key not in there or not same(line[key], there[key])]
        wrong += [key for key in there if key not in line] if whole else []
        if wrong:
            key = wrong[0]
            problems.append(f"step {line['step']}: {key} is {line.get(key)} instead of {there.get(key)}, and {len(wrong) - 1} more")
    return problems


def notes(place: Path) -> list[dict[str, Any]]:
    """What was read, with the rank that read it, in order."""
    found = []
    for path in sorted(place.glob("samples-*.jsonl")):
        rank = int(path.stem.partition("-")[2])
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # killed while it wrote
                found.append({**json.loads(line), "rank": rank})
    return found


def read_by_step(place: Path) -> dict[tuple[int, int], list[Any]]:
    """(step from 0, rank) -> the samples and windows that the last start to take this step read."""
    last: dict[int, int] = {}
    for note in notes(place):
        last[note["step"]] = max(last.get(note["step"], 0), note["start"])
    taken: dict[tuple[int, int], list[Any]] = {}
    for note in notes(place):
        if note["start"] == last[note["step"]]:
            taken.setdefault((note["step"], note["rank"]), []).append([note["samples"], note["windows"]])
    return taken


def first_step(place: Path, start: int) -> int | None:
    """The step (from 0) with which this start went on; None where it read nothing."""
    return min((note["step"] for note in notes(place) if note["start"] == start), default=None)


def newest(run_dir: Path) -> int:
    checkpoint = latest(run_dir / "checkpoints", report=lambda line: None)
    return 0 if checkpoint is None else checkpoint.step


def tensors_differ(ours: Path, theirs: Path) -> list[str]:
    """Names of tensors of the newest checkpoints that are not equal, bit for bit."""
    a, b = (latest(path / "checkpoints", report=lambda line: None) for path in (ours, theirs))
    if a is None or b is None:
        return ["there is no checkpoint"]
    if a.names() != b.names():
        return sorted(set(a.names()) ^ set(b.names()))
    return [name for name in a.names() if not _equal(a, b, name)]


def _equal(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    ours, theirs = a.read_full(name), b.read_full(name)
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def leftovers(run_dir: Path) -> list[str]:
    """Files and directories that a finished run does not have."""
    wrong = [path for pattern in ("*.partial*", "*.new", "*.old", "lock") for path in run_dir.rglob(pattern)]
    return sorted(str(path.relative_to(run_dir)) for path in wrong)


# -- a journey -----------------------------------------------------------------------------------------------------------------------------


def undisturbed(kind: Kind, root: Path) -> tuple[Path, Path]:
    """(notes, run directory) of the run that nobody kills, made once for each name."""
    place = root / "-".join(("undisturbed", *re.findall(r"\w+", kind.name)))
    run_dir = place / "run"
    if not (place / "whole").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        start = run_once(kind, place, run_dir, 0, None)
        if start.status != 0:
            raise RuntimeError(f"the undisturbed run of {kind.name} ended with status {start.status}:\n{start.output}")
        lines = numbers(run_dir)
        if [line["step"] for line in lines] != list(range(1, STEPS + 1)) or not any("sqnr_db" in key for key in lines[1]):
            raise RuntimeError(f"the undisturbed run of {kind.name} did not log what is to be compared")
        read = read_by_step(place)
        size = sorted(index for (step, _), batches in read.items() if step == 0 for samples, _ in batches for index in samples)
        if not size or set(size) != set(range(len(set(size)))):
            raise RuntimeError(f"the undisturbed run of {kind.name} read the samples {size} in its first step")
        (place / "whole").touch()
    return place, run_dir


def next_moment(cards: list[Moment], done: int, first: bool) -> Moment | None:
    """Takes the first card that this start can reach; None: let it finish."""
    remaining = STEPS - done
    for card in cards:
        possible = {"first": first, "middle": remaining >= 2 * EVERY + 2, "last": remaining <= 2 * EVERY}[card.when]
        if card.name.startswith("restore: checksums"):
            possible = possible and done > 0
        if card.name.startswith("restore: before tensors"):
            possible = possible and done > 0
        if "deleted" in card.name:
            possible = possible and remaining >= 3 * EVERY + 2
        if possible:
            cards.remove(card)
            return card
    return None


def journey(number: int, seed: int, kind: Kind, root: Path, cards: list[Moment], most: int) -> list[Result]:
    """Kills the run up to `most` times and lets it finish. cards: moments to be reached, which those that were are taken from."""
    theirs_place, theirs = undisturbed(kind, root)
    expected = numbers(theirs)
    place = root / f"journey-{number}"
    place.mkdir()  # a journey begins from nothing
    run_dir = place / "run"
    random = Random(f"{seed} {number}")
    results: list[Result] = []
    done = start_number = 0
    while True:
        if not cards:
            cards.extend(deck(kind.ranks, random))
        moment = next_moment(cards, done, start_number == 0) if len(results) < most else None
        blow = None if moment is None else draw(moment, kind.ranks, random)
        start = run_once(kind, place, run_dir, start_number, blow)
        struck = f'"start": {start_number},' in (place / "struck.jsonl").read_text() if (place / "struck.jsonl").exists() else False
        began = first_step(place, start_number)
        now = newest(run_dir)
        problems = []
        if began is not None and began != done:
            problems.append(
                f"start {start_number} went on with step {began + 1} instead of {done + 1}, though a checkpoint of step {done} was there"
            )
        if now < done:
            problems.append(f"the checkpoint of step {done} is gone, the newest is that of step {now}")
        if start.status in (998, 999) or (not struck and start.status != 0):
            problems.append(f"start {start_number} ended with status {start.status}: {start.output[-2000:]}")
        lines = differences(numbers(run_dir), expected, whole=False)
        for result in results:
            result.began = began if result.began is None else result.began
        if results:
            results[-1].problems += problems
        if blow is not None and (struck or problems):
            given = {**asdict(blow), "struck": struck, "before": done, "after": now, "status": start.status}
            results.append(Result(seed=seed, journey=number, kind=kind.name, ranks=kind.ranks, start=start_number, **given))
            results[-1].identical, results[-1].problems = not lines, [] if len(results) > 1 else list(problems)
            results[-1].problems += lines
        done, start_number = now, start_number + 1
        if not struck:
            break
    verdict = _verdict(run_dir, place, theirs, theirs_place, expected)
    if verdict and not results:
        raise RuntimeError(f"journey {number}, which nobody killed: {verdict}")
    for result in results:
        result.identical = result.identical and not verdict
    if verdict:
        results[-1].problems += verdict
    return results


def _verdict(run_dir: Path, place: Path, theirs: Path, theirs_place: Path, expected: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the run that has been killed so often, now that it is finished."""
    problems = [] if (run_dir / "finished.json").exists() else ["the run did not finish"]
    problems += differences(numbers(run_dir), expected, whole=True)
    if read_by_step(place) != read_by_step(theirs_place):
        problems.append("other samples were read than without kills")
    problems += [f"{name} is left behind" for name in leftovers(run_dir)]
    problems += [f"the tensor {name} of the last checkpoint differs" for name in tensors_differ(run_dir, theirs)[:1]]
    kept, usual = (sorted(path.name for path in (place / "checkpoints").glob("*")) for place in (run_dir, theirs))
    if len(kept) != 2 or kept != usual:
        problems.append(f"checkpoints are {kept}")
    return problems
