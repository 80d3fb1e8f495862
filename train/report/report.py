"""Pictures of one run, or of several beside each other: PNG files and one HTML page that needs nothing else.

    python -m train.report runs=[runs/a,runs/b]            # into runs/a/report of the first run
    python -m train.report runs=[runs/a,runs/b] to=DIR

The first run is the reference: gaps are relative to it. Up to six runs, so that their colours can be told apart.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.report.acceptance import draw_acceptance
from train.report.branches import draw_branches, forks
from train.report.curves import (
    draw_gap,
    draw_gradient_norms,
    draw_learning_rate,
    draw_losses,
    draw_mfu,
    draw_moe_balance,
    draw_mtp,
    draw_speed,
)
from train.report.drawing import RUN_COLOURS
from train.report.goodput import draw_goodput
from train.report.health import (
    draw_bias,
    draw_clipped,
    draw_residual,
    draw_sqnr,
    draw_underflow,
    draw_zero_gradients,
    draw_zero_scales,
)
from train.report.page import heading, page, picture, table
from train.report.sections import SECTIONS, section_of
from train.report.series import Series, load_run
from train.report.shares import draw_precision_shares
from train.report.tables import differences, facts, incident_rows, keys, sample_rows, stored_recipe
from train.report.timing import draw_phases

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
    Picture("branches", "Gap of branches", "Faint: every step both logged; strong: running mean; band: of the dashed line.", draw_branches),
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
    Picture("mtp", "MTP losses", "Of the token after the next one, and so on.", draw_mtp),
    Picture("acceptance", "Drafts the model accepts", "Of the first run that measured it; bars: 95% intervals over windows of the text.",
            draw_acceptance),
    Picture("moe", "Balance of the experts", "Maximal load over the mean, less 1; 0 is balanced.", draw_moe_balance),
    Picture("grad_norm", "Gradient norm", "Before clipping.", draw_gradient_norms),
    Picture("learning_rate", "Learning rate", "As the optimizer used it.", draw_learning_rate),
    Picture("speed", "Speed", "Tokens of the global batch per second of wall time.", draw_speed),
    Picture("mfu", "Utilisation", "The time the step's matrix products would take at the hardware's peak, as a share of the step.", draw_mfu),
    Picture("goodput", "Goodput", "Areas are seconds; grey columns: no process of the run existed.", draw_goodput),
    Picture("phases", "Time of a step", "Data: the step stood still until its batch was there.", draw_phases),
)  # fmt: skip


def draw_loss_curve(run_dir: Path) -> Path:
    """Draws <run>/report/loss.png and returns its path.

    Raises ValueError, in one sentence, when the run has logged no loss.
    """
    return draw_losses([load_run(run_dir)], Path(run_dir) / "report" / "loss.png")


def write_report(run_dirs: Sequence[Path], to: Path, say: Callable[[str], None] = print) -> Path:
    """Writes the pictures and `index.html` into `to`; returns the page. say: hears one line of every branch whose parent is there too.

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
        if (one.name == "gap" and len(runs) == 1) or (one.name == "branches" and not forks(runs)):
            continue
        try:
            drawn.append((one, one.draw(runs, to / f"{one.name}.png")))
        except ValueError as error:
            missing.append(f"{one.title}: {error}.")
    for fork in forks(runs):
        say(fork.line)
    index = to / "index.html"
    recipes = [stored_recipe(run_dir) for run_dir in run_dirs]
    html_page = _page(runs, recipes, drawn, missing, incident_rows(run_dirs, runs), sample_rows(run_dirs, runs))
    index.write_text(html_page, encoding="utf-8")
    return index


def _sections(drawn: Sequence[tuple[Picture, Path]], incidents: Sequence[Sequence[str]]) -> list[str]:
    """The pictures in their sections; those of no section come last."""
    parts: list[str] = []
    for section in (*SECTIONS, None):
        shown = [picture(one.title, one.reading, path) for one, path in drawn if section_of(one.name) is section]
        if section is not None and "incidents" in section.pictures:
            shown.append(table(["time", "run", "step", "kind", ""], incidents, text=True) if incidents else "<p>None.</p>")
        if shown:
            parts.append(heading("Further pictures" if section is None else section.title, "" if section is None else section.reading))
            parts += shown
    return parts


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest trailing parts of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _page(
    runs: Sequence[Series],
    recipes: Sequence[dict[str, Any]],
    drawn: Sequence[tuple[Picture, Path]],
    missing: Sequence[str],
    incidents: Sequence[Sequence[str]],
    samples: Sequence[Sequence[str]],
) -> str:
    names = ", ".join(run.name for run in runs)
    parts = [
        "<p>Losses are nats per token; bits per byte are those of the same validation loss. "
        "Final training losses are means over the last tenth of the logged steps.</p>",
        table(*facts(runs)),
    ]
    differing = differences(recipes)
    if differing:
        parts.append("<h2>What differs in the recipes</h2>")
        parts.append(table(["key", *keys(runs)], differing, text=True))
    elif len(runs) > 1 and all(recipes):
        parts.append("<p>The recipes are the same but for the run's name and directory.</p>")
    parts += [f"<p>{html.escape(fork.line)}</p>" for fork in forks(runs)]
    parts += _sections(drawn, incidents)
    if samples:
        parts.append(heading("Samples", "Texts the models made behind a prompt, as they were after a step."))
        parts.append(table(["run", "step", "prompt", "text"], samples, text=True))
    if missing:
        parts.append("<h2>Not drawn</h2>")
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in missing]
    return page(names, parts)
