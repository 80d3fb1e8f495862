"""Numbers and recipes as lines for a person; what was not measured is left out of a line."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from train.observe.base import Metrics, RunInfo
from train.observe.sample_settings import Sample

_WIDTH = 118  # columns of the header
_DATA_WAIT = 0.05  # of a step: a smaller wait for data is not worth a word


def step_line(metrics: Metrics, total_steps: int, seconds_left: float | None) -> str:
    """One progress line; what was not measured is left out."""
    width = len(f"{total_steps:,}")
    parts = [f"step {int(metrics['step']):>{width},}/{total_steps:,}"]
    if "loss/lm" in metrics:
        parts.append(f"loss {metrics['loss/lm']:.4f}")
    depths = [f"{metrics[key]:.4f}" for key in sorted(metrics) if key.startswith("loss/mtp_")]
    if depths:
        parts.append(f"mtp {' '.join(depths)}")
    if "grad_norm" in metrics:
        parts.append(f"grad {metrics['grad_norm']:#.3g}")
    if "learning_rate" in metrics:
        parts.append(f"lr {metrics['learning_rate']:.2e}")
    if "tokens_per_second" in metrics:
        parts.append(f"{count(metrics['tokens_per_second'])} tok/s")
    if "mfu" in metrics:
        parts.append(f"mfu {metrics['mfu']:.1%}")
    if metrics.get("seconds/data", 0.0) >= _DATA_WAIT * metrics.get("step_seconds", 0.0) > 0:
        parts.append(f"data wait {metrics['seconds/data'] / metrics['step_seconds']:.0%}")
    if seconds_left is not None:
        parts.append(f"left {duration(seconds_left)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for a person: 8.2s, 3m 05s, 2h 07m, 4d 03h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def evaluation_line(metrics: Metrics, run: RunInfo | None) -> str:
    """The step, and what one evaluation measured after it."""
    return f"{step_column(metrics, run)}  {evaluation_text(metrics)}"


def evaluation_text(metrics: Metrics) -> str:
    """What one evaluation measured: the validation loss as `loss_text`, acceptance by domain, whatever else by its name."""
    parts = [f"validation loss {loss_text(metrics)}"] if "eval/loss" in metrics else []
    shown = ("step", "tokens", "eval/loss", "eval/bits_per_byte")
    others = [key for key in metrics if key not in shown and not key.startswith(("seconds/", "accept/"))]
    return "  ".join([*parts, *acceptance_texts(metrics), *(f"{key.removeprefix('eval/')} {metrics[key]:.4g}" for key in others)])


def acceptance_texts(metrics: Metrics) -> list[str]:
    """`drafts accepted: novels 62% 41%, code ...`, a depth after the other; nothing where none were measured."""
    shares: dict[str, list[str]] = {}
    for key, value in metrics.items():
        if not key.startswith("accept/"):
            continue
        _, domain, what = key.split("/")
        if what.removeprefix("depth_").isdigit():
            shares.setdefault(domain, []).append(f"{value:.0%}")
        elif what == "length":
            shares.setdefault(domain, []).append(f"({value:.2f} tokens a pass)")
    return ["drafts accepted: " + ", ".join(f"{domain} {' '.join(each)}" for domain, each in shares.items())] if shares else []


def sample_lines(sample: Sample, head: str) -> list[str]:
    """A text behind its step, wrapped; line ends and other characters that do not print as they are typed in code."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in f"[{sample.prompt}]{sample.text}")
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{head}  ", subsequent_indent=" " * (len(head) + 2))


def loss_text(metrics: Mapping[str, Any]) -> str:
    """A validation loss in nats per token and, beside it, in bits per byte, which does not depend on the tokenizer."""
    text = f"{metrics['eval/loss']:.4f} nats per token"
    return f"{text}, {metrics['eval/bits_per_byte']:.4f} bits per byte" if "eval/bits_per_byte" in metrics else text


def beside(metrics: Mapping[str, Any]) -> str:
    """How far a validation loss is from a trigram count model's; the same text, so the same bits per byte for a nat."""
    trigram, loss = metrics.get("baseline/trigram"), metrics["eval/loss"]
    if trigram is None:
        return ""
    difference = trigram - loss
    verdict = f"{difference:.4f} below" if difference > 0 else f"{-difference:.4f} above"
    bits = f" ({metrics['eval/bits_per_byte'] / loss * trigram:.4f} bits)" if "eval/bits_per_byte" in metrics else ""
    return f"; {verdict} a trigram count model's {trigram:.4f}{bits} on the same text"


def step_column(metrics: Metrics, run: RunInfo | None) -> str:
    width = len(f"{run.total_steps:,}") if run else 1
    return f"step {int(metrics['step']):>{width},}" + (f"/{run.total_steps:,}" if run else "")


def count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + letter
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}".rstrip(".")


def recipe_lines(recipe: Mapping[str, Any]) -> list[str]:
    """The recipe as `group  key=value key=value`, wrapped; unset (null) and empty values are left out."""
    lines: list[str] = []
    width = max((len(group) for group in recipe), default=0)
    for group, value in recipe.items():
        pairs = list(_pairs("", value)) if isinstance(value, Mapping) else [str(value)]
        if pairs:
            head = f"  {group:<{width}}  "
            lines += textwrap.wrap(
                " ".join(pairs),
                _WIDTH,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines


def _pairs(prefix: str, values: Mapping[str, Any]) -> list[str]:
    pairs: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _pairs(f"{prefix}{key}.", value)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            pairs.append(f"{prefix}{key}=[{len(value)}]")  # rules, phases: the precision table and recipe.yaml show them
        elif isinstance(value, list | tuple):
            if value:
                pairs.append(f"{prefix}{key}=[{','.join(map(str, value))}]")
        elif value is not None and value != "":
            pairs.append(f"{prefix}{key}={value}")
    return pairs
