"""The pictures and numbers of docs/nvfp4.md, from the tensors of one training microbatch of a finished run.

python -m docs.nvfp4_pictures run=runs/tiny to=docs/nvfp4          # a run, or one of its checkpoints

The checkpoint's weights see one microbatch of training text, forward and backward, in the run's own precision. Meanwhile every linear layer
leaves x, W and dy here, as they are before quantisation. What follows is arithmetic on those: four pictures, and the numbers of the page.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from docs.nvfp4_numbers import print_numbers
from docs.nvfp4_tensors import (
    LAYERS,
    SHOWN,
    Seen,
    along_columns,
    along_rows,
    block_of,
    capture,
    say,
    sqnr,
)
from model.precision import hadamard as rht
from model.precision import mxfp8, nvfp4, philox
from parallel import groups
from train.arguments import key_values
from train.report import drawing as pictures

BLUE, RED, GREEN, PINK, ORANGE, SKY = pictures.RUN_COLOURS
GREY = "#555555"
LOOKS = {
    "features": (BLUE, "o"),
    "features, nearest": (BLUE, "o"),
    "1 × 16": (BLUE, "o"),
    "16 × 16": (ORANGE, "v"),
    "features, stochastic": (PINK, "o"),
    "tokens": (GREEN, "s"),
    "tokens, stochastic": (GREEN, "s"),
    "tokens, rotated": (RED, "^"),
    "tokens, rotated, stochastic": (RED, "^"),
    "MXFP8": (GREY, "D"),
}


def draw_block(seen: Seen, path: Path, *, token: int, block: int) -> None:
    """Picture 1: the grid, and one block of x before and after."""
    x = seen.x[token, 16 * block : 16 * block + 16]
    amax = seen.x.abs().amax()
    scaled, code, scale = block_of(x, amax)
    value = code * (scale * amax * torch.tensor(1 / 2688))
    print(f"\nOne block: {SHOWN}, x, token {token}, features {16 * block} to {16 * block + 15}")
    say("amax of the operand", amax)
    say("S = 2688 / amax", nvfp4.global_scale(amax))
    say("block amax, and block amax * S / 6 before it is rounded to E4M3", x.abs().amax(), x.abs().amax() * nvfp4.global_scale(amax) / 6)
    say("block scale sf", scale)
    say("enc = S / sf", nvfp4.global_scale(amax) / scale)
    say("sf * amax / 2688, what a code of 1 is worth", scale * amax / 2688)
    for index in range(16):
        say(f"x[{index}], x * enc, code, value", x[index], scaled[index], code[index], value[index])
    say("SQNR of this block, dB", sqnr(x, value))

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 7.4), layout="constrained", height_ratios=(1, 2.5))
    edges = (0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0)
    for low, high, shade in zip(edges, edges[1:], ("#EAF2F8", "#D5E6F2") * 4, strict=False):
        top.axvspan(low, high, color=shade, zorder=0)
    for place in nvfp4.GRID:
        top.plot([place, place], [0.0, 1.0], color=BLUE, linewidth=2.2)
        top.text(place, 1.06, f"{place:g}", ha="center", va="bottom", color=BLUE, weight="bold", fontsize=12)
    top.scatter(scaled.abs(), np.full(16, 0.42), s=46, color=RED, zorder=4, edgecolor="white", linewidth=0.8)
    top.text(5.0, 0.76, "the 16 elements\nbelow, |x| · enc", ha="center", va="center", color=RED, weight="bold", fontsize=10)
    top.set_xlim(-0.12, 7.0)
    top.set_ylim(0.0, 1.38)
    top.set_yticks([])
    top.grid(False)
    top.spines["left"].set_visible(False)
    top.set_title("The E2M1 grid: each shade rounds to the value inside it (negative numbers alike)")

    places = np.arange(16)
    bottom.axhline(0.0, color=GREY, linewidth=0.9)
    bottom.bar(places - 0.2, x, width=0.38, color=BLUE, label="x")
    bottom.bar(places + 0.2, value, width=0.38, color=GREEN, label="code · sf · amax / 2688")
    room = 0.3 * float(x.max() - x.min())
    bottom.set_ylim(float(x.min()) - room, float(x.max()) + room)
    for index in range(16):
        height = max(float(x[index]), float(value[index])) if x[index] > 0 else min(float(x[index]), float(value[index]))
        up = x[index] > 0
        bottom.annotate(
            f"{float(code[index]):g}".replace("-", "−"), (index, height), xytext=(0, 3 if up else -4), textcoords="offset points",
            ha="center", va="bottom" if up else "top", color=GREEN, weight="bold", fontsize=11,
        )  # fmt: skip
    bottom.set_xticks(places, [str(16 * block + index) for index in range(16)])
    bottom.set_xlabel(f"feature of token {token}; the number at each bar is its code")
    bottom.grid(False, axis="x")
    bottom.set_title(f"One block of x, {SHOWN}:  sf = {scale:g},  amax = {float(amax):.4f},  SQNR {sqnr(x, value):.1f} dB")
    bottom.legend(loc="lower center", ncols=2, frameon=False, bbox_to_anchor=(0.5, -0.02))
    pictures.save(figure, path)


def groups_of(x: Tensor) -> Tensor:
    """x [tokens, features] as groups of 16 consecutive tokens of one feature: [features, tokens / 16, 16]."""
    return x.T.unflatten(1, (-1, nvfp4.BLOCK))


def block_sqnr(exact: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """SQNR in dB [...] and the quantised values [..., 16] of every block of exact [..., 16]."""
    encoded = nvfp4.encode(exact, exact.abs().amax(-1), amax)
    value = encoded.code * (encoded.scale * amax / 2688).unsqueeze(-1)
    noise = (value.double() - exact).square().sum(-1)
    return (10 * torch.log10(exact.double().square().sum(-1) / noise)).float(), value


def draw_hadamard(seen: Seen, path: Path) -> None:
    """Picture 2: one group of 16 tokens with an outlier before and after the rotation, and all groups."""
    exact = groups_of(seen.x)
    rotated = rht.rotate(exact)
    amax, amax_rotated = exact.abs().amax(), rotated.abs().amax()
    before, value = block_sqnr(exact, amax)
    after, value_rotated = block_sqnr(rotated, amax_rotated)
    change = after - before
    crest = exact.abs().amax(-1) / exact.square().mean(-1).sqrt()
    crest_rotated = rotated.abs().amax(-1) / rotated.square().mean(-1).sqrt()
    chosen = int(crest.flatten().argmax())
    feature, group = divmod(chosen, crest.shape[1])

    def at(t: Tensor) -> Tensor:
        return t[feature, group]

    back = at(value_rotated) @ rht.FIXED.matrix().T  # orthogonal: the transpose undoes it
    small = torch.arange(16) != at(exact).abs().argmax()
    print(f"\nHadamard: {SHOWN}, x along tokens, feature {feature}, tokens {16 * group} to {16 * group + 15} (largest crest factor of all)")
    say("crest factor (largest / rms; 4 is the most 16 elements can have), before, after", at(crest), at(crest_rotated))
    say("SQNR of this group in dB, before, after", at(before), at(after))
    say("elements of this group that become 0, before, after", (at(value) == 0).sum(), (at(value_rotated) == 0).sum())
    say(
        "SQNR of its 15 small elements, before, after rotating back",
        sqnr(at(exact)[small], at(value)[small]),
        sqnr(at(exact)[small], back[small]),
    )
    say("amax of the operand, before, after", amax, amax_rotated)
    say("mean crest factor, before, after", crest.mean(), crest_rotated.mean())
    say("SQNR of the whole operand in dB, before, after", sqnr(exact, value), sqnr(rotated, value_rotated))
    say(
        "elements of the operand that become 0, %, before, after",
        100 * (value == 0).float().mean(),
        100 * (value_rotated == 0).float().mean(),
    )
    say("groups whose SQNR rises, %; mean change, dB", 100 * (change > 0).float().mean(), change[torch.isfinite(change)].mean())

    figure, grid = plt.subplots(1, 3, figsize=(10, 4.9), layout="constrained", width_ratios=(1, 1, 1.15))
    tokens = np.arange(16)
    for axes, values, result, title, note in (
        (grid[0], at(exact), at(value), "Before", f"SQNR {float(at(before)):.1f} dB, {int((at(value) == 0).sum())} zeros"),
        (grid[1], at(rotated), at(value_rotated), "After", f"SQNR {float(at(after)):.1f} dB, {int((at(value_rotated) == 0).sum())} zeros"),
    ):
        axes.bar(tokens, values.abs(), width=0.8, color=SKY, label="magnitude")
        axes.scatter(tokens, result.abs(), s=26, color=RED, zorder=4, label="in NVFP4")
        axes.set_title(f"{title} rotation")
        axes.set_xlabel(f"{note}", color=RED, weight="bold")
        axes.set_xticks([])
        axes.grid(False, axis="x")
        axes.set_ylim(0.0, float(at(exact).abs().amax()) * 1.16)
    grid[0].set_ylabel(f"|x| of 16 tokens, feature {feature}")
    grid[1].legend(loc="upper right", frameon=False, handletextpad=0.4)
    change = change[torch.isfinite(change)]
    grid[2].hist(change, bins=np.arange(-10, 10.5, 0.5), color=SKY, edgecolor="white", linewidth=0.6)
    grid[2].axvline(0.0, color=GREY, linewidth=1.2)
    grid[2].axvline(float(change.mean()), color=RED, linewidth=1.8)
    grid[2].text(float(change.mean()) - 0.4, 1.0, f"mean {float(change.mean()):+.1f}".replace("-", "−"), color=RED, weight="bold",
                 ha="right", va="top", transform=grid[2].get_xaxis_transform())  # fmt: skip
    grid[2].set_title(f"All {change.numel():,} groups")
    grid[2].set_xlabel("SQNR after − before, in dB")
    grid[2].set_ylabel("groups")
    grid[2].grid(False, axis="x")
    pictures.save(figure, path)


def draw_stochastic(seen: Seen, path: Path, *, token: int, draws: int = 4096) -> None:
    """Picture 3: the mean of many draws against the true value, for elements of a gradient."""
    dy, amax = seen.dy, seen.dy.abs().amax()
    blocks = dy.unflatten(1, (-1, nvfp4.BLOCK))
    encoded = nvfp4.encode(blocks, blocks.abs().amax(-1), amax)
    enc = torch.div(torch.tensor(1.0), encoded.scale * torch.div(torch.tensor(1.0), nvfp4.global_scale(amax)))
    scaled = blocks * enc.unsqueeze(-1)
    row, keys = scaled[token], seen.keys
    features = dy.shape[1]
    bits = torch.stack(
        [
            philox.random_bytes(
                philox.stream_key(seen.site.seed, seen.site.name, "dy"),
                sample=keys.sample[token : token + 1], position=keys.position[token : token + 1], step=step, features=features,
            )[0]
            for step in range(draws)
        ]
    ).view(draws, -1, nvfp4.BLOCK)  # fmt: skip
    codes = nvfp4.round_e2m1_stochastic(row.clamp(-6, 6).expand(draws, -1, -1), bits)
    true, mean = row.abs().flatten(), (codes.mean(0) * row.sign()).flatten()
    nearest = nvfp4.round_e2m1(row.clamp(-6, 6)).abs().flatten()

    print(f"\nStochastic rounding: {SHOWN}, dy, token {token}, {draws} draws (the bytes of steps 0 to {draws - 1})")
    inside = true <= 6
    say("elements of this row, and how many of them scale above 6", len(true), (~inside).sum())
    say(
        "mean |mean code - true|, elements below 6: nearest, stochastic",
        (nearest - true)[inside].abs().mean(),
        (mean - true)[inside].abs().mean(),
    )
    say("mean code - true, elements below 6: nearest, stochastic", (nearest - true)[inside].mean(), (mean - true)[inside].mean())
    say("mean code - true, elements above 6: both", (mean - true)[~inside].mean())

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.9), layout="constrained", width_ratios=(1.25, 1))
    left.axhline(0.0, color=GREY, linewidth=0.9)
    left.scatter(true, nearest - true, s=13, color=BLUE, label="round to nearest")
    left.scatter(true, mean - true, s=13, color=RED, label=f"stochastic, mean of {draws}", zorder=4)
    left.set_xlabel("true magnitude, in code units (|dy| · enc)")
    left.set_ylabel("mean code − true magnitude")
    left.set_xticks(nvfp4.GRID, [f"{place:g}" for place in nvfp4.GRID])
    left.set_title(f"{len(true)} gradient elements of one token")
    left.legend(loc="lower left", frameon=False, handletextpad=0.2)
    end = (float(true.max()), float((mean - true)[true.argmax()]))
    left.annotate("above 6\nboth clip", end, xytext=(0, -26), textcoords="offset points", ha="center", va="top", color=GREY,
                  arrowprops={"arrowstyle": "->", "color": GREY})  # fmt: skip
    wanted = (0.16, 2.3, 4.7)
    count = np.arange(1, draws + 1)
    flat = (codes * row.sign()).flatten(1)
    for place, colour in zip(wanted, (BLUE, GREEN, ORANGE), strict=True):
        index = int((true - place).abs().argmin())
        right.plot(count, flat[:, index].cumsum(0).numpy() / count, color=colour, linewidth=1.6)
        right.axhline(float(true[index]), color=colour, linewidth=1.2, linestyle=(0, (5, 4)))
        right.annotate(
            f"{float(true[index]):.2f}", (1.0, float(true[index])), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", color=colour, weight="bold", annotation_clip=False,
        )  # fmt: skip
        right.scatter([1.0], [float(nearest[index])], marker=">", s=60, color=colour, clip_on=False, zorder=5)
    right.set_xscale("log")
    right.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    right.minorticks_off()
    right.set_xlim(1, draws)
    right.set_ylim(-0.25, 6.25)
    right.set_yticks(nvfp4.GRID, [f"{place:g}" for place in nvfp4.GRID])
    right.set_xlabel("draws  (dashed: true; triangle: nearest)")
    right.set_ylabel("mean code so far")
    right.set_title("Three of them, draw by draw")
    pictures.save(figure, path)


def _errors(seen: Seen) -> dict[str, dict[str, float]]:
    """SQNR in dB of every operand in every way."""
    x, dy, w, rows = seen.x, seen.dy, seen.weight.flatten(0, 1), seen.rows

    def tokens(x: Tensor, **options: Any) -> float:
        return sqnr(*along_columns(x, rows, **options))

    def eight(x: Tensor) -> float:
        return sqnr(x, mxfp8.quantize(x).dequantize())

    return {
        "x": {
            "features": sqnr(x, along_rows(x, rows)),
            "tokens": tokens(x, hadamard=False),
            "tokens, rotated": tokens(x, hadamard=True),
            "MXFP8": eight(x),
        },
        "W": {
            "1 × 16": sqnr(w, along_rows(w, seen.weight_rows)),
            "16 × 16": sqnr(w, along_rows(w, seen.weight_rows, along="tiles")),
            "MXFP8": eight(w),
        },
        "dy": {
            "features, nearest": sqnr(dy, along_rows(dy, rows)),
            "features, stochastic": sqnr(dy, along_rows(dy, rows, stream=seen.stream("dy"))),
            "tokens, stochastic": tokens(dy, hadamard=False, stream=seen.stream("dy_t")),
            "tokens, rotated, stochastic": tokens(dy, hadamard=True, stream=seen.stream("dy_t")),
            "MXFP8": eight(dy),
        },
    }


def draw_errors(seen: dict[str, Seen], path: Path) -> None:
    """Picture 4: SQNR of x, W and dy of several layers, by the way they are quantised."""
    errors = {name: _errors(seen[name]) for name in LAYERS}
    print("\nSQNR in dB by operand")
    for kind in ("x", "W", "dy"):
        print(f"  {kind}: " + " | ".join(errors[LAYERS[0]][kind]))
        for name in LAYERS:
            say(f"  {name}", *errors[name][kind].values())

    print("  elements that become 0, %: x | W | dy, rounded to nearest")
    for name in LAYERS:
        one, w = seen[name], seen[name].weight.flatten(0, 1)
        results = (
            (along_rows(one.x, one.rows), one.x),
            (along_rows(w, one.weight_rows, along="tiles"), w),
            (along_rows(one.dy, one.rows), one.dy),
        )
        say(f"  {name}", *(100 * ((value == 0) & (exact != 0)).float().mean() for value, exact in results))

    figure, grid = plt.subplots(1, 3, figsize=(10, 6.8), layout="constrained", sharey=True, sharex=True)
    places = np.arange(len(LAYERS))
    for axes, kind, title in zip(grid, ("x", "W", "dy"), ("x  (activations)", "W  (weights)", "dy  (gradients)"), strict=True):
        ways = list(errors[LAYERS[0]][kind])
        for index, way in enumerate(ways):
            shift = 0.0 if way == "MXFP8" else 0.17 * (index - (len(ways) - 2) / 2)
            colour, marker = LOOKS[way]
            values = [errors[name][kind][way] for name in LAYERS]
            axes.scatter(values, places + shift, s=42, color=colour, marker=marker, label=way, zorder=3)
        axes.set_title(title)
        axes.set_xlabel("SQNR in dB  (right is better)")
        axes.set_ylim(len(LAYERS) - 0.5, -0.5)
        axes.set_yticks(places, [name.replace("layers.", "layer ").replace(".mixer", "").replace("_experts", "") for name in LAYERS])
        axes.grid(False, axis="y")
        for place in places[1:]:
            axes.axhline(place - 0.5, color="#DDDDDD", linewidth=0.8, zorder=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, handletextpad=0.2, fontsize=10)
    pictures.save(figure, path)


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        values = key_values(arguments, ("run", "to"))
        if not isinstance(values.get("run"), str):
            raise ValueError("run=... is missing: python -m docs.nvfp4_pictures run=runs/tiny to=docs/nvfp4")
        seen = capture(values["run"])
        if missing := [name for name in LAYERS if name not in seen]:
            raise ValueError(f"{values['run']} has no {missing[0]}: the pictures are of a run of the tiny recipe")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        groups.shutdown()
    to = Path(str(values.get("to", "docs/nvfp4")))
    one = seen[SHOWN]
    with plt.rc_context(pictures.STYLE):
        draw_block(one, to / "block.png", token=64, block=2)
        draw_hadamard(one, to / "hadamard.png")
        draw_stochastic(one, to / "stochastic.png", token=64)
        draw_errors(seen, to / "errors.png")
    print_numbers(seen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
