"""The pictures and numbers of docs/nvfp4.md, from the tensors of one training microbatch of a finished run.

python -m docs.nvfp4_pictures run=runs/tiny to=docs/nvfp4          # a run, or one of its checkpoints

The checkpoint's weights see one microbatch of training text, forward and backward, in the run's own precision. Meanwhile every linear layer
leaves x, W and dy here, as they are before quantisation. What follows is arithmetic on those: four pictures, and the numbers of the page.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import model.linear
import model.moe
from model.precision import hadamard as rht
from model.precision import mxfp8, nvfp4, philox
from model.precision.backends.reference import Reference
from model.precision.formats.base import Format
from model.precision.formats.fp32 import FP32
from model.precision.formats.mxfp8 import MXFP8
from model.precision.formats.nvfp4 import NVFP4, NVFP4Options
from model.precision.linear import grouped_linear, linear
from model.precision.operand import Encoding, Rows, pad_rows, per_row
from model.precision.site import Site, TokenKeys
from parallel import groups
from parallel.layout import world_size
from train.arguments import key_values
from train.build import build
from train.checkpoint.checkpointer import load_weights
from train.checkpoint.reader import open_checkpoint
from train.recipe.load import read_recipe
from train.report import drawing as pictures
from train.run_directory import stored_recipe
from train.step import LossStep, to_microbatch

BACKEND = Reference()
BLUE, RED, GREEN, PINK, ORANGE, SKY = pictures.RUN_COLOURS
GREY = "#555555"
SHOWN = "layers.0.mixer.in_proj"  # whose blocks are drawn
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
LAYERS = (
    "layers.0.mixer.in_proj",
    "layers.0.mixer.out_proj",
    "layers.1.mixer.experts.up_proj",
    "layers.1.mixer.experts.down_proj",
    "layers.1.mixer.shared_experts.up_proj",
    "layers.1.mixer.shared_experts.down_proj",
    "layers.3.mixer.qkv_proj",
    "layers.3.mixer.o_proj",
    "lm_head",
)


# -- what a layer saw ------------------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The operands of one linear layer: x fp32 [tokens, K], weight fp32 [groups, N, K], dy fp32 [tokens, N]; tokens belong to groups."""

    site: Site
    x: Tensor
    weight: Tensor
    rows: Rows
    keys: TokenKeys
    step: int
    dy: Tensor = field(default_factory=lambda: torch.empty(0))

    def stream(self, operand: str, step: int | None = None) -> philox.Stream:
        """The random bytes this run draws for "dy" or "dy_t", at its own or another step."""
        expert = None
        if self.site.first_expert is not None:
            sizes = torch.tensor(self.rows.sizes)
            expert = (torch.arange(len(sizes)) + self.site.first_expert).repeat_interleave(sizes)
        key = philox.stream_key(self.site.seed, self.site.name, operand)
        return philox.Stream(key, self.keys.sample, self.keys.position, self.step if step is None else step, expert=expert)

    @property
    def weight_rows(self) -> Rows:
        return Rows((self.weight.shape[1],) * self.weight.shape[0])


@contextmanager
def recording() -> Iterator[dict[str, Seen]]:
    """Inside, the first call of every linear layer leaves its operands in the dictionary."""
    seen: dict[str, Seen] = {}

    def note(site: Site, x: Tensor, weight: Tensor, sizes: Sequence[int] | None, keys: TokenKeys, step: int, y: Tensor) -> Tensor:
        if site.name not in seen:  # the head also serves MTP
            flat = x.detach().reshape(-1, x.shape[-1]).float().clone()
            stacked = weight.detach().reshape(-1, *weight.shape[-2:]).float().clone()
            one = seen[site.name] = Seen(site, flat, stacked, Rows(tuple(sizes or (len(flat),))), keys, step)

            def keep(dy: Tensor) -> None:
                one.dy = dy.reshape(-1, dy.shape[-1]).float().clone()

            y.register_hook(keep)
        return y

    def plain(x: Tensor, weight: Tensor, formats: Any, site: Site, keys: TokenKeys, step: int, *rest: Any) -> Tensor:
        return note(site, x, weight, None, keys, step, linear(x, weight, formats, site, keys, step, *rest))

    def grouped(x: Tensor, weight: Tensor, sizes: Sequence[int], formats: Any, site: Site, keys: TokenKeys, step: int) -> Tensor:
        return note(site, x, weight, sizes, keys, step, grouped_linear(x, weight, sizes, formats, site, keys, step))

    with patch.object(model.linear, "linear", plain), patch.object(model.moe, "grouped_linear", grouped):
        yield seen


def capture(path: str) -> dict[str, Seen]:
    """What the linear layers of a checkpoint see in one training microbatch; weights are not changed."""
    checkpoint = open_checkpoint(path)
    run = build(read_recipe(stored_recipe(checkpoint), world_size()))
    load_weights(checkpoint, run.chunks)
    recipe = run.recipe
    step = min(checkpoint.step, recipe.total_steps - 1)
    batch = run.data.batch(run.plan.samples(step)[0], step)
    microbatch = to_microbatch(batch, run.layout.device, step / recipe.total_steps, recipe.model.mtp_depths)
    losses = LossStep(run.layout, microbatch.loss_counts(), recipe.model.mtp_loss_scale)
    with recording() as seen:
        run.engine.train_step(
            losses,
            [microbatch],
            sequence_length=recipe.train.sequence_length,
            micro_batch_size=recipe.micro_batch_size,
            learning_rate=0.0,
        )
    say(
        f"checkpoint of step {checkpoint.step}, microbatch of step {step}: {microbatch.documents.numel()} tokens, LM loss",
        losses.means()[0],
    )
    return seen


# -- quantised and back ----------------------------------------------------------------------------------------------------------------


def along_rows(x: Tensor, rows: Rows, **options: Any) -> Tensor:
    """x [rows, features] in NVFP4 with blocks along features, or in tiles, back in fp32. options: of `Encoding`."""
    encoding = Encoding(**options)
    amax = BACKEND.amax(x, rows, encoding)
    products = BACKEND.quantize(x, amax, rows, encoding)
    assert isinstance(products, Tensor)
    return products * (amax if encoding.row_scaled else per_row(amax, rows)) / (nvfp4.MAX_CODE * encoding.bound)


def along_columns(x: Tensor, rows: Rows, *, hadamard: bool, stream: philox.Stream | None = None) -> tuple[Tensor, Tensor]:
    """(x with its rows padded, and rotated with `hadamard`; the same from NVFP4 with blocks along rows), fp32 [padded rows, features]."""
    exact = pad_rows(x, rows)
    if hadamard:
        exact = rht.rotate(exact.T).T
    encoding = Encoding("columns", stream, rht.FIXED if hadamard else None)
    amax = BACKEND.amax(x, rows, encoding)
    products = BACKEND.quantize(x, amax, rows, encoding)
    assert isinstance(products, Tensor)
    return exact, products * per_row(amax, encoding.stored(rows)) / 2688


def sqnr(exact: Tensor, quantised: Tensor) -> float:
    """Signal to quantisation noise, dB: 20 dB is a relative error of 10%."""
    return float(10 * torch.log10(exact.double().square().sum() / (quantised.double() - exact).square().sum()))


def relative(exact: Tensor, value: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.double().norm())


def nvfp4_format(**options: Any) -> Format:
    return NVFP4(NVFP4Options(**options))


def gemms(seen: Seen, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW of the layer, all three GEMMs in one format, by the code that trains."""
    site = replace(seen.site, weights=type(seen.site.weights)())
    x, weight = seen.x.clone().requires_grad_(), seen.weight.clone().requires_grad_()
    if seen.site.first_expert is None:
        y = linear(x, weight[0], (form,) * 3, site, seen.keys, seen.step)
    else:
        y = grouped_linear(x, weight, seen.rows.sizes, (form,) * 3, site, seen.keys, seen.step)
    y.backward(seen.dy)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def block_of(x: Tensor, amax: Tensor, random_bits: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """(x * enc before rounding [16], codes [16], block scale) of one block x [16]."""
    encoded = nvfp4.encode(x[None], x.abs().amax()[None], amax, random_bits=None if random_bits is None else random_bits[None])
    decode = torch.div(torch.tensor(1.0), nvfp4.global_scale(amax))
    return x * torch.div(torch.tensor(1.0), encoded.scale * decode), encoded.code[0], float(encoded.scale)


def say(what: str, *values: float | Tensor) -> None:
    print(f"  {what:<86}" + "".join(f"{float(value):>11.5g}" for value in values))


# -- pictures --------------------------------------------------------------------------------------------------------------------------


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


def mean_over_bytes(round_with: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The exact expectation of stochastic rounding: the mean over all 256 random bytes."""
    total = torch.zeros_like(like, dtype=torch.float64)
    for byte in range(256):
        total += round_with(torch.full(like.shape, byte, dtype=torch.uint8))
    return (total / 256).float()


def bias_of(x: Tensor) -> dict[str, float]:
    """Bias of NVFP4 on x [rows, features] with blocks along features, one amax."""
    blocks, amax = x.unflatten(1, (-1, nvfp4.BLOCK)), x.abs().amax()
    block_amax = blocks.abs().amax(-1)
    nearest = nvfp4.encode(blocks, block_amax, amax)
    worth = (nearest.scale * amax / 2688).unsqueeze(-1)
    mean = mean_over_bytes(lambda bits: nvfp4.encode(blocks, block_amax, amax, random_bits=bits).code, blocks)
    clipped = blocks.abs() > nvfp4.MAX_CODE * worth * (1 + 1e-6)
    whole = blocks.abs().sum()

    def net(code: Tensor, where: Tensor | None = None) -> float:
        error = (code * worth - blocks) * blocks.sign()
        return 100 * float(error.sum() / whole if where is None else error[where].sum() / blocks.abs()[where].sum())

    return {
        "clipped": 100 * float(clipped.float().mean()),
        "of_clipped": net(mean, clipped),
        "stochastic": net(mean),
        "nearest": net(nearest.code),
        "mean_nearest": 100 * float((nearest.code * worth - blocks).abs().sum() / whole),
        "mean_stochastic": 100 * float((mean * worth - blocks).abs().sum() / whole),
    }


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


# -- numbers ---------------------------------------------------------------------------------------------------------------------------


def print_levels(seen: Seen) -> None:
    """What the fp32 level is for."""
    print("\nTwo levels: " + SHOWN)
    for kind, x in (("x", seen.x), ("dy", seen.dy)):
        blocks = x.unflatten(1, (-1, nvfp4.BLOCK))
        block_amax, amax = blocks.abs().amax(-1), x.abs().amax()
        with_level = nvfp4.round_e4m3(block_amax * (nvfp4.global_scale(amax) / 6))
        without = nvfp4.round_e4m3(block_amax / 6)
        say(f"{kind}: amax, smallest block amax", amax, block_amax.min())
        say(f"{kind}: largest block amax / smallest non-zero one", amax / block_amax[block_amax > 0].min())
        say(
            f"{kind}: blocks with scale 0, %, with S, without S",
            100 * (with_level == 0).float().mean(),
            100 * (without == 0).float().mean(),
        )
        say(f"{kind}: smallest and largest block scale with S", with_level.min(), with_level.max())


def print_bias(seen: Seen) -> None:
    print("\nBias, in % of the sum of magnitudes: elements clipped | of the clipped | net, stochastic | net, nearest")
    normal = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    for name, x in (("N(0, 1)", normal), (f"dy of {SHOWN}, every 8th token", seen.dy[::8].contiguous())):
        bias = bias_of(x)
        say(name, bias["clipped"], bias["of_clipped"], bias["stochastic"], bias["nearest"])
        say("  mean |expected value - true|: nearest, stochastic", bias["mean_nearest"], bias["mean_stochastic"])


def print_averaging(seen: Seen, draws: int = 64) -> None:
    """What unbiasedness is worth: the error of dgrad when draws are averaged (W exact)."""
    w, exact = seen.weight[0], seen.dy @ seen.weight[0]
    nearest = along_rows(seen.dy, seen.rows) @ w
    blocks, amax = seen.dy.unflatten(1, (-1, nvfp4.BLOCK)), seen.dy.abs().amax()
    block_amax = blocks.abs().amax(-1)
    mean = mean_over_bytes(lambda bits: nvfp4.encode(blocks, block_amax, amax, random_bits=bits).products().view_as(blocks), blocks)
    expected = mean.flatten(1) * amax / 2688 @ w
    total = torch.zeros_like(exact)
    for draw in range(draws):
        one = along_rows(seen.dy, seen.rows, stream=seen.stream("dy", step=draw)) @ w
        total += one
        if draw == 0:
            first = relative(exact, one)
    print("\nRelative error of dx, % (dy in NVFP4, W exact): nearest | one stochastic draw | mean of draws | expectation")
    say(
        f"{SHOWN}, {draws} draws",
        100 * relative(exact, nearest),
        100 * first,
        100 * relative(exact, total / draws),
        100 * relative(exact, expected),
    )


def print_transpose(seen: Seen) -> None:
    """Whether W and its transpose quantise to the same values."""
    w = seen.weight[0]
    print("\nW against its transpose: elements whose value differs, %")
    for scaling in ("1d", "2d"):
        one, other = (nvfp4.quantize(t, scaling=scaling).dequantize() for t in (w, w.T.contiguous()))
        say(scaling, 100 * (one != other.T).float().mean())


def print_gemms(seen: dict[str, Seen]) -> None:
    """Relative errors of the three GEMMs against fp32, by the code that trains."""
    forms: dict[str, Format] = {
        "nvfp4 recipe": nvfp4_format(),
        "without Hadamard": nvfp4_format(hadamard=False),
        "round to nearest": nvfp4_format(stochastic_rounding=False),
        "1d weights": nvfp4_format(weight_scaling="1d"),
        "4over6_mse, bound 256": nvfp4_format(clipping="4over6_mse", e4m3_bound=256),
        "mxfp8": MXFP8(),
    }
    print("\nRelative error of y, dx, dW against fp32, %")
    for name in LAYERS:
        exact = gemms(seen[name], FP32())
        for label, form in forms.items():
            say(f"{name:<42}{label}", *(100 * relative(a, b) for a, b in zip(exact, gemms(seen[name], form), strict=True)))


def print_exactness(seen: Seen) -> None:
    """code * scale is exact in bf16; a rounded, fully dequantised operand is not the same GEMM."""
    x, w, rows = seen.x, seen.weight[0], seen.rows
    of_x, of_w = Encoding("rows"), Encoding("tiles")
    ax, aw = BACKEND.amax(x, rows, of_x), BACKEND.amax(w, seen.weight_rows, of_w)
    px, pw = BACKEND.quantize(x, ax, rows, of_x), BACKEND.quantize(w, aw, seen.weight_rows, of_w)
    assert isinstance(px, Tensor) and isinstance(pw, Tensor)
    alpha = ax * aw / 2688**2
    truth = (px.double() @ pw.double().T) * alpha.double()
    late = (px.to(torch.bfloat16).float() @ pw.to(torch.bfloat16).float().T) * alpha
    dequantised = [(p * a / 2688).to(torch.bfloat16).float() for p, a in ((px, ax), (pw, aw))]
    print("\nGEMM on code * scale: " + SHOWN)
    say("products that bf16 changes", (px.to(torch.bfloat16).float() != px).sum() + (pw.to(torch.bfloat16).float() != pw).sum())
    say("largest |y - exact| / max |y|: bf16 products, alpha after", (late - truth).abs().max() / truth.abs().max())
    say(
        "                               operands dequantised, rounded to bf16",
        (dequantised[0] @ dequantised[1].T - truth).abs().max() / truth.abs().max(),
    )


def print_options(seen: dict[str, Seen]) -> None:
    print("\nOptions of forward operands, SQNR in dB: default | 4over6_mae 256 | 4over6_mse 256 | 4over6_mse 448 | row-scaled")
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"clipping": "4over6_mae", "bound": 256.0},
        {"clipping": "4over6_mse", "bound": 256.0},
        {"clipping": "4over6_mse"},
    )
    for name in LAYERS:
        one, w = seen[name], seen[name].weight.flatten(0, 1)
        say(f"x of {name}", *(sqnr(one.x, along_rows(one.x, one.rows, **way)) for way in (*ways, {"row_scaled": True})))
        say(f"W of {name}", *(sqnr(w, along_rows(w, one.weight_rows, along="tiles", **way)) for way in ways))


def print_layouts(seen: dict[str, Seen]) -> None:
    """How much a layout moves the values."""
    print("\nLayouts: elements whose quantised value differs, %")
    one = seen[SHOWN]
    w = one.weight[0]
    whole = along_rows(w, one.weight_rows, along="tiles")
    half = w.shape[0] // 32 * 16
    shards = [along_rows(part.contiguous(), Rows((len(part),)), along="tiles") for part in (w[:half], w[half:])]
    say("W cut in two by output features, each with its own amax", 100 * (torch.cat(shards) != whole).float().mean())
    say("  SQNR in dB: whole, cut", sqnr(w, whole), sqnr(w, torch.cat(shards)))
    expert = seen["layers.1.mixer.experts.up_proj"]
    index = max(range(len(expert.rows.sizes)), key=lambda i: expert.rows.sizes[i])
    start, stop = expert.rows.bounds[index]
    x = expert.x[start:stop]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rows = Rows((len(x),))
    by_features = along_rows(x[order], rows) != along_rows(x, rows)[order]
    say(f"x of one expert ({len(x)} tokens) in another token order: fprop", 100 * by_features.float().mean())
    for hadamard in (False, True):
        exact, value = along_columns(x, rows, hadamard=hadamard)
        exact_moved, moved = along_columns(x[order], rows, hadamard=hadamard)
        if not hadamard:
            say("  wgrad without Hadamard", 100 * (moved[: len(x)] != value[order]).float().mean())
        say(
            f"  wgrad {'with' if hadamard else 'without'} Hadamard, SQNR in dB: one order, the other",
            sqnr(exact, value),
            sqnr(exact_moved, moved),
        )


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
    print_levels(one)
    print_transpose(one)
    print_bias(one)
    print_averaging(one)
    print_exactness(one)
    print_gemms(seen)
    print_options(seen)
    print_layouts(seen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
