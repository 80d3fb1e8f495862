"""The sections in which a run is watched: the one definition behind the local report and the W&B workspace."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A chart over the steps. pattern: a regular expression, whole metric names; unit: what is counted."""

    title: str
    pattern: str
    unit: str = ""
    log: bool = False


@dataclass(frozen=True)
class Section:
    """pictures: of the report, by name; panels: of the W&B workspace."""

    title: str
    reading: str
    pictures: tuple[str, ...]
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "Loss and gap",
        "Nats per token. A gap that grows is the sign that a precision does not hold.",
        ("loss", "gap", "branches", "grad_norm", "learning_rate"),
        (
            Panel("LM loss", "loss/(lm|total)", "nats per token"),
            Panel("Validation", "eval/(loss|bits_per_byte)", "nats per token; bits per byte"),
            Panel("Gap", "gap/.*", "%"),
            Panel("Gradient norm before clipping", "grad_norm", log=True),
            Panel("Learning rate", "learning_rate"),
        ),
    ),
    Section(
        "MTP",
        "Losses of the tokens behind the next one, and how many drafts are accepted.",
        ("mtp", "acceptance"),
        (
            Panel("MTP losses", "loss/mtp_.*", "nats per token"),
            Panel("Acceptance", "accept/.*/depth_[0-9]+", "share of drafts"),
            Panel("Accepted length", "accept/.*/length", "tokens a pass"),
        ),
    ),
    Section(
        "Throughput and goodput",
        "What the hardware does, and what is left of the time.",
        ("speed", "mfu", "phases", "goodput"),
        (
            Panel("Tokens per second", "tokens_per_second"),
            Panel("MFU", "mfu|goodput/mfu", "of the peak"),
            Panel("Goodput", "goodput/percent", "% of the time"),
            Panel("Seconds by use", "goodput/.*_seconds", "seconds"),
            Panel("Time of a step", "step_seconds|seconds/.*", "seconds"),
            Panel("Memory", "memory_peak_bytes", "bytes"),
        ),
    ),
    Section(
        "MoE balance",
        "Maximal load of an expert over the mean, less 1: 0 is balanced.",
        ("moe",),
        (Panel("Violation", "moe/.*violation.*", "max / mean - 1"), Panel("Auxiliary loss", "moe/aux_loss")),
    ),
    Section(
        "Precision health",
        "What runs in which format, and what quantisation does to it.",
        ("precision", "sqnr", "underflow", "clipped", "bias", "zero_scales", "zero_gradients", "residual"),
        (
            Panel("FLOPs by format", "precision/share/.*", "share of GEMM FLOPs"),
            Panel("Signal to quantisation noise", "precision/.*/sqnr_db", "dB"),
            Panel("Underflow", "precision/.*/underflow", "share"),
            Panel("Clipping", "precision/.*/clipped", "share"),
            Panel("Zero gradients", "precision/.*/wgrad/zero", "share", log=True),
        ),
    ),
    Section(
        "Incidents",
        "What a person should have known at once; incidents.jsonl has all of it.",
        ("incidents",),
        (
            Panel("Rewinds, samples left out", "rewinds|data/skipped_samples"),
            Panel("Stragglers", "stragglers?/.*", "slowest / median"),
        ),
    ),
)


def section_of(picture: str) -> Section | None:
    """The section a picture of the report stands in."""
    return next((section for section in SECTIONS if picture in section.pictures), None)
