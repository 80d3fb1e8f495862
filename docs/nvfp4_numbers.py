"""The numbers of docs/nvfp4.md that no picture shows; printed by `python -m docs.nvfp4_pictures`."""

from typing import Any

import torch
from torch import Tensor

from docs.nvfp4_tensors import (
    BACKEND,
    LAYERS,
    SHOWN,
    Seen,
    along_columns,
    along_rows,
    bias_of,
    gemms,
    mean_over_bytes,
    nvfp4_format,
    relative,
    say,
    sqnr,
)
from model.precision import nvfp4
from model.precision.formats.base import Format
from model.precision.formats.fp32 import FP32
from model.precision.formats.mxfp8 import MXFP8
from model.precision.operand import Encoding, Rows


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


def print_numbers(seen: dict[str, Seen]) -> None:
    """Everything; seen: of every layer in LAYERS."""
    one = seen[SHOWN]
    print_levels(one)
    print_transpose(one)
    print_bias(one)
    print_averaging(one)
    print_exactness(one)
    print_gemms(seen)
    print_options(seen)
    print_layouts(seen)
