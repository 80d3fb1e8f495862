"""The tables of the page: the runs and what they came to, and where their recipes differ."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.observe.incidents import read_incidents
from train.observe.redact import without_secrets
from train.observe.samples import read_samples
from train.recipe.guard import read_yaml
from train.report.drawing import RUN_COLOURS
from train.report.series import Series, final, gap

_MOST_INCIDENTS = 100
_MOST_SAMPLES = 100


def keys(runs: Sequence[Series]) -> list[str]:
    """The runs as table cells: a dot in the colour of the run's lines, and its name."""
    dot = '<span class="key" style="background:{}"></span>{}'
    return [dot.format(colour, html.escape(run.name)) for colour, run in zip(RUN_COLOURS, runs, strict=False)]


def facts(runs: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of runs."""
    depths = sorted({key for run in runs for key in run.keys("loss/mtp_")})
    columns: list[tuple[str, Callable[[Series], str]]] = [
        ("parameters", lambda run: _whole(run.facts.get("parameters"))),
        ("active", lambda run: _whole(run.facts.get("active_parameters"))),
        ("steps", lambda run: _whole(run.entries[-1]["step"])),
        ("tokens", lambda run: _whole(run.entries[-1].get("tokens"))),
        ("LM loss", lambda run: _loss(run, "loss/lm")),
        *((f"MTP {key.rpartition('_')[2]}", _loss_of(key)) for key in depths),
        ("validation", lambda run: _last(run, "eval/loss")),
        ("tokens/s", lambda run: _median(run, "tokens_per_second", ",.0f")),
    ]
    if any(run.keys("eval/bits_per_byte") for run in runs):
        columns.insert(-1, ("bits per byte", lambda run: _last(run, "eval/bits_per_byte")))
    if any(run.keys("mfu") for run in runs):
        columns.append(("MFU", lambda run: _median(run, "mfu", ".1%")))
    if len(runs) > 1:
        columns.insert(5, ("gap", lambda run: _gap(run, runs[0])))
    if any(run.baseline is not None for run in runs):
        columns.append(("trigram model", _baseline))
    rows = [[key, *(value(run) for _, value in columns)] for key, run in zip(keys(runs), runs, strict=True)]
    return ["run", *(name for name, _ in columns)], rows


def _loss_of(key: str) -> Callable[[Series], str]:
    return lambda run: _loss(run, key)


def _loss(run: Series, key: str) -> str:
    values = run.of(key)[1]
    return f"{final(values):.4f}" if len(values) else ""


def _last(run: Series, key: str) -> str:
    values = run.of(key)[1]
    return f"{values[-1]:.4f}" if len(values) else ""


def _median(run: Series, key: str, form: str) -> str:
    values = run.of(key)[1]
    return f"{np.median(values):{form}}" if len(values) else ""


def _baseline(run: Series) -> str:
    """Nats per token and, as the last evaluation says how many bits per byte a nat is, bits per byte."""
    if run.baseline is None:
        return ""
    loss, bits = run.of("eval/loss")[1], run.of("eval/bits_per_byte")[1]
    beside = f" ({run.baseline * bits[-1] / loss[-1]:.4f} bits)" if len(loss) and len(bits) else ""
    return f"{run.baseline:.4f}{beside}"


def _gap(run: Series, reference: Series) -> str:
    if run is reference:
        return "reference"
    percent = gap(run, reference)[1]
    return f"{final(percent):+.2f}%" if len(percent) else ""


def _whole(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else ""


def differences(recipes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows (key, one value per run) of the recipe keys that are not the same everywhere; the run's own name left
    out."""
    if len(recipes) < 2 or not all(recipes):
        return []
    flat = [_flatten(recipe) for recipe in recipes]
    rows = []
    for key in sorted(set().union(*flat)):
        values = [values.get(key) for values in flat]
        if key not in ("run.name", "run.dir") and any(value != values[0] for value in values):
            rows.append([html.escape(key), *(html.escape("-" if value is None else str(value)) for value in values)])
    return rows


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def incident_rows(run_dirs: Sequence[Path], runs: Sequence[Series]) -> list[list[str]]:
    """Rows (time, run, step, kind, text) of what happened to the runs, oldest first; the last hundred."""
    found = [
        [str(one.get("time", "")), run.name, str(one.get("step", "")), str(one.get("kind", "")), str(one.get("text", ""))]
        for run_dir, run in zip(run_dirs, runs, strict=True)
        for one in read_incidents(Path(run_dir))
    ]
    return [[html.escape(cell) for cell in row] for row in sorted(found)[-_MOST_INCIDENTS:]]


def sample_rows(run_dirs: Sequence[Path], runs: Sequence[Series]) -> list[list[str]]:
    """Rows (run, step, prompt, text) of what the models of the runs said, oldest first; the last hundred."""
    found = [
        (row["step"], run.name, row["prompt"], row["text"])
        for run_dir, run in zip(run_dirs, runs, strict=True)
        for row in read_samples(Path(run_dir))
    ]
    latest = sorted(found, key=lambda row: row[0])[-_MOST_SAMPLES:]
    return [[html.escape(str(cell)) for cell in (name, step, *texts)] for step, name, *texts in latest]


def stored_recipe(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        return {}
    recipe = read_yaml(path.read_bytes(), str(path))
    return without_secrets(recipe) if isinstance(recipe, Mapping) else {}
