"""<run>/incidents/step-*.json and .md: one incident, for a program and for a person."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.text_data import TextData
from train.incidents.diagnosis import Finding

FOLDER = "incidents"
LISTED = 256  # samples that are looked up one by one


@dataclass(frozen=True)
class Incident:
    """kind: not finite, spike, replicas or state. first, last: the steps concerned (from 1). samples: global ones of all ranks, as (first, behind the
    last); suspects: those of `last`. cause: what a person reads first. finding: of the diagnosis, where there was one that found something."""

    kind: str
    first: int
    last: int
    cause: str
    samples: tuple[tuple[int, int], ...] = ()
    suspects: tuple[tuple[int, int], ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    diagnosed: bool = False
    finding: Finding | None = None


def write_report(run_dir: Path, incident: Incident, decision: str, layout: str, data: TextData) -> Path:
    """Writes both files; returns the one for a person. A second incident at the same step gets a number."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"step-{incident.last:08d}", *(f"step-{incident.last:08d}-{n}" for n in range(2, 1000))]
    name = next(name for name in names if not (folder / f"{name}.json").exists())
    indices = [index for begin, end in incident.suspects for index in range(begin, end)][:LISTED]
    entry: dict[str, Any] = {
        "kind": incident.kind,
        "steps": [incident.first, incident.last],
        "cause": incident.cause,
        "decision": decision,
        "samples": [list(pair) for pair in incident.samples],
        "samples_of_last_step": [data.where(index) for index in indices],
        "numbers": {key: value if abs(value) < float("inf") else str(value) for key, value in incident.numbers.items()},
        "first_not_finite": None if incident.finding is None else incident.finding.plain(),
        "reproduced": incident.finding is not None if incident.diagnosed else None,
        "layout": layout,
    }
    (folder / f"{name}.json").write_text(json.dumps(entry, indent=2) + "\n")
    path = folder / f"{name}.md"
    path.write_text(_page(incident, entry))
    return path


def _page(incident: Incident, entry: dict[str, Any]) -> str:
    steps = f"step {incident.last}" if incident.first == incident.last else f"steps {incident.first} to {incident.last}"
    lines = [f"# {incident.kind}: {steps}", "", f"{incident.cause}.", "", f"What was done: {entry['decision']}.", ""]
    if incident.diagnosed:
        found = "None, when the step was repeated: a fault of the machine is likelier than one of the numbers"
        if incident.finding is not None:
            found = incident.finding.sentence()
        lines += ["## First value that was not finite", "", f"{found}.", ""]
    if incident.numbers:
        lines += ["## Numbers of the last step", "", *(f"- {key}: {value}" for key, value in entry["numbers"].items()), ""]
    if incident.samples:
        ranges = ", ".join(f"{begin} to {end - 1}" for begin, end in incident.samples)
        lines += ["## Samples", "", f"Global samples {ranges}. Those of the last step:", ""]
        lines += ["| sample | source | window | documents |", "|---|---|---|---|"]
        for row in entry["samples_of_last_step"]:
            first, last = row["documents"]
            lines.append(f"| {row['sample']} | {row['source']} | {row['window']} | {first if first == last else f'{first} to {last}'} |")
        lines.append("")
    return "\n".join([*lines, f"Layout: {entry['layout']}.", ""])
