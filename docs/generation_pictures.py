"""The picture of a round in docs/generation.md: draft, verify, roll back, as it happened in a text of a finished run.

python -m docs.generation_pictures run=runs/tiny to=docs/generation          # a run, or one of its checkpoints
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from parallel import groups
from train.arguments import key_values
from train.checkpoint.reader import open_checkpoint
from train.generation.drafter import Drafter
from train.generation.sampling import Sampling
from train.generation.speaker import Speaker, open_speaker
from train.generation.texts import generate, read
from train.report import drawing as pictures

BLUE, RED, GREEN, _, ORANGE, _ = pictures.RUN_COLOURS
GREY, PALE = "#777777", "#EEEEEE"
PROMPT, DEPTH, GREEDY = "It is a truth universally acknowledged, that ", 3, Sampling(temperature=0)


@dataclass(frozen=True)
class Round:
    """before: the text up to the token chosen last; drafts of the next ones; choices: what the model chose behind that token and each draft."""

    before: str
    drafts: str
    choices: str

    @property
    def right(self) -> int:
        return next(
            (n for n, (draft, choice) in enumerate(zip(self.drafts, self.choices, strict=False)) if draft != choice), len(self.drafts)
        )


@torch.inference_mode()
def some_round(speaker: Speaker, right: int, tokens: int = 200) -> Round:
    """The first in a text in which just so many drafts were right."""
    prompt = speaker.tokenizer.encode(PROMPT).tolist()
    text = prompt + [token for (token,) in generate(speaker, [prompt], tokens, GREEDY) if token is not None]
    for known in range(len(prompt) + 1, len(text) - DEPTH):
        drafter = Drafter.of(speaker, DEPTH, 0)
        hidden, _ = read(speaker, text[: known - 1], 0, drafter=drafter)
        ids = torch.tensor([text[:known] + [0] * (DEPTH + 1)])
        Drafter.joined([drafter]).draft(hidden, [1], ids, GREEDY)
        drafts = ids[0, known : known + DEPTH].tolist()
        choices: list[int] = []
        for count in range(DEPTH + 1):
            choices += [token for token in next(generate(speaker, [text[:known] + drafts[:count]], 1, GREEDY)) if token is not None]
        found = Round(*(speaker.tokenizer.decode(part) for part in (text[:known], drafts, choices)))
        if found.right == right and (found.before[-1] + found.drafts + found.choices).isalpha():
            return found
    raise ValueError(f"no round of {tokens} tokens of this run has just {right} of {DEPTH} drafts right: train it longer")


def box(axes: Axes, x: float, y: float, text: str, colour: str, *, filled: bool = True, width: float = 0.8) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.28),
            width,
            0.56,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=colour if filled else "white",
            edgecolor=colour,
            linewidth=1.4,
            linestyle="-" if filled else (0, (2, 2)),
        )
    )
    shown = "␣" if text == " " else text
    axes.text(x, y, shown, ha="center", va="center", color="white" if filled and colour != PALE else "#444444", fontsize=12)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0})


def draw(found: Round, path: Path) -> None:
    shown = found.before[-4:]
    last = len(shown) - 1  # the column of the token chosen last
    with plt.rc_context(pictures.STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")

        def say(y: float, title: str, text: str) -> None:
            axes.text(-0.7, y + 0.14, title, ha="right", va="center", fontweight="bold")
            axes.text(-0.7, y - 0.18, text, ha="right", va="center", fontsize=9, color=GREY)

        say(5.6, "text", "certain, the last one chosen just now")
        for column, character in enumerate(shown):
            box(axes, column, 5.6, character, BLUE if column == last else PALE)
        say(4.5, "1  draft", "the model's MTP heads, one after another")
        for number, draft in enumerate(found.drafts):
            arrow(axes, (last + number + 0.42, 5.6 if not number else 4.5), (last + number + 0.58, 4.5), ORANGE)
            box(axes, last + 1 + number, 4.5, draft, ORANGE)
        say(3.4, "2  verify", "one pass of the model over all of them")
        axes.add_patch(FancyBboxPatch((last - 0.4, 3.16), DEPTH + 0.8, 0.48, boxstyle="round,pad=0.02", facecolor=PALE, edgecolor=GREY))
        for number, character in enumerate(shown[-1] + found.drafts):
            axes.text(last + number, 3.4, "␣" if character == " " else character, ha="center", va="center", fontsize=12)
            arrow(axes, (last + number + 0.05, 3.12), (last + number + 0.85, 2.66), GREY)
        say(2.3, "its own choices", "good as long as the drafts before them were")
        for number, choice in enumerate(found.choices):
            good = number <= found.right
            box(axes, last + 1 + number, 2.3, choice, GREEN if good else GREY, filled=good)
        marks = [("= draft", GREEN)] * found.right + [("≠ draft", RED)]
        for number, (mark, colour) in enumerate(marks):
            axes.text(last + 1 + number, 1.87, mark, ha="center", va="center", color=colour, fontsize=9)
        say(1.2, "3  roll back: Mamba", "a state behind every token was kept: this one goes on")
        say(0.2, "attention", "the length says how many count: the rest is written over")
        for column in range(last + DEPTH + 1):
            number = column - last
            if number >= 0:
                box(axes, column, 1.2, f"$h_{{{number}}}$", BLUE if number == found.right else GREY, filled=number == found.right)
            box(axes, column, 0.2, "k v", BLUE if number <= found.right else GREY, filled=number <= found.right)
        axes.set_xlim(-6.3, last + DEPTH + 1.9)
        axes.set_ylim(-0.3, 6.1)
        axes.axis("off")
        tokens = found.right + 1
        axes.set_title(f"One round: {DEPTH} drafts, {found.right} right, {tokens} tokens for one pass of the model", loc="left")
        pictures.save(figure, path)


def main(arguments: Sequence[str]) -> int:
    values = key_values(arguments, ("run", "to"))
    try:
        found = some_round(open_speaker(open_checkpoint(values.get("run", "runs/tiny")), "fp32"), right=1)
    finally:
        groups.shutdown()
    draw(found, Path(values.get("to", "docs/generation")) / "round.png")
    print(f"{found.before!r}, drafts {found.drafts!r}, choices {found.choices!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
