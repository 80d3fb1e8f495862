"""Journeys, one after another, until there were kills enough."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

from tests.survival.journey import KINDS, Kind, Result, journey
from tests.survival.moments import MOMENTS, Moment, deck

RESULTS = "results.jsonl"
MOST = 9  # kills of a run


def sweep(root: Path, seed: int, kills: int, kinds: Sequence[Kind] = KINDS, most: int = MOST) -> list[Result]:
    """Results are kept in `root`, where a sweep that was ended goes on."""
    root.mkdir(parents=True, exist_ok=True)
    results = read(root)
    print(f"survival: {kills} kills, seed {seed}, in {root}", flush=True)
    while len(results) < kills:
        number = 1 + max((result.journey for result in results), default=-1)
        kind = kinds[number % len(kinds)]
        shutil.rmtree(root / f"journey-{number}", ignore_errors=True)
        left = kills - len(results)
        new = journey(number, seed, kind, root, cards_of(seed, kind, results), min(most, left))
        if not new:
            raise RuntimeError(f"journey {number} reached none of its moments")
        results += new
        with (root / RESULTS).open("a") as file:
            file.writelines(json.dumps(asdict(result)) + "\n" for result in new)
        for result in new:
            who = f"rank {result.rank} of {result.ranks}, killed: {result.victims}"
            fate = "; ".join(result.problems) or f"went on from step {result.after}, identical"
            print(f"journey {number}, start {result.start}: {result.moment} ({who}): {fate}", flush=True)
        if not any(result.problems for result in new):
            shutil.rmtree(root / f"journey-{number}")
    return results


def again(root: Path, seed: int, number: int, kinds: Sequence[Kind] = KINDS, most: int = MOST) -> list[Result]:
    """A journey of the sweep, with the same kills."""
    before = [result for result in read(root) if result.journey < number]
    shutil.rmtree(root / f"journey-{number}", ignore_errors=True)
    kind = kinds[number % len(kinds)]
    return journey(number, seed, kind, root, cards_of(seed, kind, before), most)


def cards_of(seed: int, kind: Kind, results: Sequence[Result]) -> list[Moment]:
    """Moments that runs of so many ranks have not been killed at yet, or have least often."""
    counts = {moment.name: 0 for moment in MOMENTS}
    for result in results:
        if result.ranks == kind.ranks:
            counts[result.moment] += 1
    return sorted(deck(kind.ranks, Random(f"{seed} {len(results)}")), key=lambda moment: counts[moment.name])


def read(root: Path) -> list[Result]:
    path = root / RESULTS
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: Sequence[Result]) -> str:
    """Moments by ranks, in Markdown: kills, and how many of them the run went on from with the same numbers."""
    ranks = sorted({result.ranks for result in results})
    lines = [
        "| killed | " + " | ".join(f"{count} rank{'s' * (count > 1)}" for count in ranks) + " | of these identical |",
        "|---|" + "---:|" * (len(ranks) + 1),
    ]

    def row(name: str, chosen: Sequence[Result]) -> str:
        counts = [sum(result.ranks == count for result in chosen) for count in ranks]
        good = sum(result.identical and not result.problems for result in chosen)
        return f"| {name} | " + " | ".join(str(count or "") for count in counts) + f" | {good} of {len(chosen)} |"

    for moment in MOMENTS:
        chosen = [result for result in results if result.moment == moment.name]
        if chosen:
            lines.append(row(moment.name, chosen))
    lines.append(row("**all**", results))
    return "\n".join(lines)
