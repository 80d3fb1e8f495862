"""Pictures of one run, or of several beside each other: PNG files and one HTML page that needs nothing else.

    python -m train.report runs=[runs/a,runs/b]            # into runs/a/report of the first run
    python -m train.report runs=[runs/a,runs/b] to=DIR

The first run is the reference: gaps are relative to it. Up to six runs, so that their colours can be told apart.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from train.observe.facts import read_facts
from train.observe.metrics import read_metrics
from train.observe.redact import without_secrets
from train.report.drawing import (
    RUN_COLOURS,
    Series,
    draw_bias,
    draw_clipped,
    draw_gap,
    draw_gradient_norms,
    draw_learning_rate,
    draw_losses,
    draw_precision_shares,
    draw_residual,
    draw_speed,
    draw_sqnr,
    draw_underflow,
    draw_zero_gradients,
    draw_zero_scales,
    final,
    gap,
)
from train.report.page import page, picture, table

MOST_RUNS = len(RUN_COLOURS)


@dataclass(frozen=True)
class Picture:
    """A picture of the page: its file name, heading, and the sentence that says how to read it."""

    name: str
    title: str
    reading: str
    draw: Callable[[Sequence[Series], Path], Path]


PICTURES = (
    Picture("loss", "Loss", "Faint: every logged step; strong: running mean; dots: evaluations.", draw_losses),
    Picture(
        "gap",
        "Gap to the first run",
        "LM loss divided by the first run's at the same step; only steps that both runs logged.",
        draw_gap,
    ),
    Picture("precision", "Precision", "Linear layers only: fprop, dgrad and wgrad, experts at active FLOPs.",
            draw_precision_shares),
    Picture("sqnr", "Quantisation noise", "Of the first run that measured it; x_t, w_t, dy_t: blocks along the other dimension; grey: not quantised.",
            draw_sqnr),
    Picture("underflow", "Underflow", "The same operands.", draw_underflow),
    Picture("clipped", "Clipping", "Block maxima whose scale was rounded down.", draw_clipped),
    Picture("bias", "Rounding bias", "What is left after errors of both signs cancel.", draw_bias),
    Picture("zero_scales", "Zero scales", "Blocks lost as a whole.", draw_zero_scales),
    Picture("zero_gradients", "Zero gradients", "After the first microbatch; experts without a token count, too.", draw_zero_gradients),
    Picture("residual", "Residual stream", "Where magnitudes grow, and behind which kind of layer.", draw_residual),
    Picture("grad_norm", "Gradient norm", "Before clipping.", draw_gradient_norms),
    Picture("learning_rate", "Learning rate", "As the optimizer used it.", draw_learning_rate),
    Picture("speed", "Speed", "Tokens of the global batch per second of wall time.", draw_speed),
)  # fmt: skip


def draw_loss_curve(run_dir: Path) -> Path:
    """Draws <run>/report/loss.png and returns its path.

    Raises ValueError, in one sentence, when the run has logged no loss.
    """
    return draw_losses([load_run(run_dir)], Path(run_dir) / "report" / "loss.png")


def load_run(run_dir: Path, name: str | None = None) -> Series:
    """The series of a run directory, named after it.

    Raises ValueError, in one sentence, when it has no usable metrics.jsonl.
    """
    run_dir = Path(run_dir)
    entries = read_metrics(run_dir)
    facts = read_facts(run_dir)
    return Series(name or run_dir.resolve().name, entries, facts.get("baseline/trigram"), facts)


def write_report(run_dirs: Sequence[Path], to: Path) -> Path:
    """Writes the pictures and `index.html` into `to`; returns the page.

    A picture whose metric no run logged is left out and named on the page. Raises ValueError, in one sentence, for no
    run, too many, one named twice, or one without metrics.
    """
    run_dirs = [Path(run_dir) for run_dir in run_dirs]
    if not run_dirs:
        raise ValueError("runs=[] names no run: write for instance runs=[runs/a,runs/b]")
    if len(run_dirs) > MOST_RUNS:
        raise ValueError(f"runs has {len(run_dirs)} entries: name at most {MOST_RUNS}, more cannot be told apart")
    resolved = [run_dir.resolve() for run_dir in run_dirs]
    twice = [str(run_dirs[i]) for i, path in enumerate(resolved) if path in resolved[:i]]
    if twice:
        raise ValueError(f"runs names {twice[0]} twice: name each run once")
    runs = [load_run(run_dir, name) for run_dir, name in zip(run_dirs, _names(resolved), strict=True)]
    draw_losses(runs, to / "loss.png")  # no finite loss at all is an error of the command, not a gap of the page
    drawn: list[tuple[Picture, Path]] = []
    missing: list[str] = []
    for one in PICTURES:
        if one.name == "gap" and len(runs) == 1:
            continue
        try:
            drawn.append((one, one.draw(runs, to / f"{one.name}.png")))
        except ValueError as error:
            missing.append(f"{one.title}: {error}.")
    index = to / "index.html"
    index.write_text(_page(runs, [_recipe(run_dir) for run_dir in run_dirs], drawn, missing), encoding="utf-8")
    return index


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest trailing parts of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _recipe(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({str(error).splitlines()[0]}): restore it or leave this run out") from None
    return without_secrets(recipe) if isinstance(recipe, Mapping) else {}


def _page(
    runs: Sequence[Series],
    recipes: Sequence[dict[str, Any]],
    drawn: Sequence[tuple[Picture, Path]],
    missing: Sequence[str],
) -> str:
    names = ", ".join(run.name for run in runs)
    parts = [
        "<p>Losses are nats per token. Final training losses are means over the last tenth of the logged steps.</p>",
        table(*_facts(runs)),
    ]
    differences = _differences(recipes)
    if differences:
        parts.append("<h2>What differs in the recipes</h2>")
        parts.append(table(["key", *_keys(runs)], differences, text=True))
    elif len(runs) > 1 and all(recipes):
        parts.append("<p>The recipes are the same but for the run's name and directory.</p>")
    parts += [picture(one.title, one.reading, path) for one, path in drawn]
    if missing:
        parts.append("<h2>Not drawn</h2>")
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in missing]
    return page(names, parts)


def _keys(runs: Sequence[Series]) -> list[str]:
    """The runs as table cells: a dot in the colour of the run's lines, and its name."""
    dot = '<span class="key" style="background:{}"></span>{}'
    return [dot.format(colour, html.escape(run.name)) for colour, run in zip(RUN_COLOURS, runs, strict=False)]


def _facts(runs: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    depths = sorted({key for run in runs for key in run.keys("loss/mtp_")})
    columns: list[tuple[str, Callable[[Series], str]]] = [
        ("parameters", lambda run: _whole(run.facts.get("parameters"))),
        ("active", lambda run: _whole(run.facts.get("active_parameters"))),
        ("steps", lambda run: _whole(run.entries[-1]["step"])),
        ("tokens", lambda run: _whole(run.entries[-1].get("tokens"))),
        ("LM loss", lambda run: _loss(run, "loss/lm")),
        *((f"MTP {key.rpartition('_')[2]}", _loss_of(key)) for key in depths),
        ("validation", lambda run: _last(run, "eval/loss")),
        ("tokens/s", lambda run: _median(run, "tokens_per_second")),
    ]
    if len(runs) > 1:
        columns.insert(5, ("gap", lambda run: _gap(run, runs[0])))
    if any(run.baseline is not None for run in runs):
        columns.append(("trigram model", lambda run: "" if run.baseline is None else f"{run.baseline:.4f}"))
    rows = [[key, *(value(run) for _, value in columns)] for key, run in zip(_keys(runs), runs, strict=True)]
    return ["run", *(name for name, _ in columns)], rows


def _loss_of(key: str) -> Callable[[Series], str]:
    return lambda run: _loss(run, key)


def _loss(run: Series, key: str) -> str:
    values = run.of(key)[1]
    return f"{final(values):.4f}" if len(values) else ""


def _last(run: Series, key: str) -> str:
    values = run.of(key)[1]
    return f"{values[-1]:.4f}" if len(values) else ""


def _median(run: Series, key: str) -> str:
    values = run.of(key)[1]
    return f"{np.median(values):,.0f}" if len(values) else ""


def _gap(run: Series, reference: Series) -> str:
    if run is reference:
        return "reference"
    percent = gap(run, reference)[1]
    return f"{final(percent):+.2f}%" if len(percent) else ""


def _whole(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else ""


def _differences(recipes: Sequence[dict[str, Any]]) -> list[list[str]]:
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
