"""The texts of `--help` and of docs/recipes.md (`python -m train.recipe.document`): how to write a command, and every key of a recipe."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator

from train.recipe.keys import Key, groups, keys
from train.recipe.shipped import options, recipes
from train.refusal import REFUSED
from train.signals import INTERRUPTED, STOPPED

WIDEST = 120
USAGE = (
    ("-cn RECIPE", "a recipe of recipes/; without it, tiny"),
    ("key=value", "any key below; lists as key=[a,b]; a group at once as precision=mxfp8; quote what the shell would read"),
    ("--help [GROUP]", "this text, or the keys of one group: --help optimizer"),
    ("--cfg job", "print the composed recipe and stop"),
    ("-m key=a,b", "a sweep: every combination is a process and a run directory of its own, finished ones are skipped"),
)
DURATIONS = (
    "Durations are steps (300, 300steps), tokens (2.5M tokens, 200B tokens; rounded up to a step) or a share of the run (54.2%; rounded down "
    "to a step)."
)
STATUSES = (
    ("0", "the run is finished, or reached run.stop_after"),
    ("1", "the run failed, or a job of a sweep did"),
    (str(REFUSED), "the command line or the recipe is wrong; one sentence says how"),
    (str(STOPPED), "stopped by SIGTERM, SIGINT or SIGUSR1, with a checkpoint; the same command started again goes on"),
    (str(INTERRUPTED), "ended by a second SIGINT, without a checkpoint"),
)


def help_text(module: str, within: str | None = None) -> str:
    """For a terminal. within: only keys that begin with it (a group, or part of one). Raises ValueError where no key does."""
    width = min(shutil.get_terminal_size((100, 24)).columns, WIDEST)
    chosen = [key for key in keys() if within is None or key.name == within or key.name.startswith(f"{within}.")]
    if not chosen:
        raise ValueError(f"--help {within} names no group of keys: use one of {', '.join(groups())}, or --help alone")
    lines = [f"python -m {module} -cn RECIPE [key=value ...]", ""]
    if within is None:
        lines += [
            *_columns(USAGE, width),
            "",
            "Exit status",
            *_columns(STATUSES, width),
            "",
            "Recipes",
            *_columns(recipes().items(), width),
        ]
        for group, choices in options().items():
            lines += ["", f"Options of {group}=", *_columns(choices.items(), width)]
        lines.append("")
    lines += textwrap.wrap(DURATIONS, width)
    for group, about in groups().items():
        inside = [key for key in chosen if key.group == group]
        if inside:
            lines += ["", f"{group}: {about}"]
            for key in inside:
                lines += _entry(key, width)
    return "\n".join(lines)


def _columns(rows: Iterable[tuple[str, str]], width: int) -> Iterator[str]:
    pairs = list(rows)
    first = max(len(a) for a, _ in pairs) + 4
    for name, text in pairs:
        yield from textwrap.wrap(text, width, initial_indent=f"  {name}".ljust(first), subsequent_indent=" " * first) or [f"  {name}"]


def _entry(key: Key, width: int) -> Iterator[str]:
    default = "must be given" if key.default is None else f"default {key.default}"
    yield from textwrap.wrap(f"{key.name}  ({key.type}; {default})", width, initial_indent="  ", subsequent_indent="      ")
    yield from textwrap.wrap(key.meaning, width, initial_indent="      ", subsequent_indent="      ")


def document() -> str:
    """docs/recipes.md."""
    lines = [
        "# Recipes: every key",
        "",
        "Written from the dataclasses that hold a recipe; `python -m train --help` prints the same:",
        "",
        "```",
        "python -m train.recipe.document to=docs/recipes.md",
        "```",
        "",
        "A run is described by one recipe: a file in `recipes/`, merged over the defaults below, with `key=value` from the command line on top.",
        "Groups of keys have ready-made options, chosen by their name (`precision=mxfp8`). What is wrong is answered in one sentence, before",
        "anything is allocated.",
        "",
        DURATIONS,
        "",
        "## The command line",
        "",
        "`python -m train -cn RECIPE [key=value ...]`",
        "",
        *_table(("argument", "meaning"), [(f"`{argument}`", text) for argument, text in USAGE]),
        "",
        *_table(("exit status", "meaning"), STATUSES),
        "",
        "## Shipped recipes",
        "",
        *_table(("recipe", "what"), [(f"`{name}`", text) for name, text in recipes().items()]),
    ]
    for group, choices in options().items():
        lines += ["", *_table((f"`{group}=`", "what"), [(f"`{name}`", text) for name, text in choices.items()])]
    known = list(keys())
    for group, about in groups().items():
        rows = [
            (f"`{key.name}`", key.type, "must be given" if key.default is None else f"`{key.default}`", key.meaning)
            for key in known
            if key.group == group
        ]
        lines += ["", f"## {group}", "", about, "", *_table(("key", "type", "default", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
