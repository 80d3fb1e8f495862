"""Measurements one after the other, each a line of a file, in which a sweep that was ended goes on; and their tables."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.layouts.cases import Case
from tests.layouts.compare import Comparison

Line = dict[str, Any]


def read(path: Path, part: str) -> list[Line]:
    """What a sweep of this part has measured."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["part"] == part]


def go_on(path: Path, part: str, wanted: Iterable[tuple[str, Callable[[], Line]]], most: int | None = None) -> list[Line]:
    """Measures what of `wanted`, (name, how), is not in the file yet, at most so many. A line has at least its `problems`, a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read(path, part)
    done, new = {line["name"] for line in lines}, 0
    for name, measure in wanted:
        if name in done:
            continue
        if most is not None and new >= most:
            break
        begun = time.monotonic()
        line = {"part": part, "name": name, **measure(), "seconds": round(time.monotonic() - begun, 1)}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        new += 1
        print(f"{name} ({line['seconds']:g} s): {'; '.join(line['problems']) or 'equal'}", flush=True)
    return lines


def of_cases(comparison: Comparison, cases: Iterable[Case]) -> Iterable[tuple[str, Callable[[], Line]]]:
    """Layouts, to be measured against one rank."""

    def measure(case: Case) -> Line:
        difference = comparison(case)
        return {"ranks": case.ranks, **asdict(difference), "problems": difference.problems()}

    for case in cases:
        yield f"{case.ranks}: {case.name}", partial(measure, case)


def table(lines: Sequence[Line]) -> str:
    """In Markdown: largest relative differences from one rank."""
    rows = ["| layout | ranks | losses | gradient norm | MoE | parameters | replicas |", "|---|---:|---:|---:|---:|---:|---|"]
    for line in lines:
        values = " | ".join(f"{line[key]:.1e}" for key in ("losses", "gradient_norm", "moe", "parameters"))
        same = f"{len(line['replicas'])} differ" if line["replicas"] else "same bits" if line["ranks"] > 1 else ""
        rows.append(f"| {line['name'].partition(': ')[2].replace('|', chr(92) + '|')} | {line['ranks']} | {values} | {same} |")
    return "\n".join(rows)
