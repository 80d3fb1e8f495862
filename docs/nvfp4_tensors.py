"""What the linear layers of a checkpoint see in one training microbatch, and NVFP4 on it, for the pictures and numbers of docs/nvfp4.md."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import model.linear
import model.moe
from model.precision import hadamard as rht
from model.precision import nvfp4, philox
from model.precision.backends.reference import Reference
from model.precision.formats.base import Format
from model.precision.formats.nvfp4 import NVFP4, NVFP4Options
from model.precision.linear import grouped_linear, linear
from model.precision.operand import Encoding, Rows, pad_rows, per_row
from model.precision.site import Site, TokenKeys
from parallel.layout import world_size
from train.build import build
from train.checkpoint.checkpointer import load_weights
from train.checkpoint.reader import open_checkpoint
from train.recipe.load import read_recipe
from train.run_directory import stored_recipe
from train.step import LossStep, to_microbatch

BACKEND = Reference()
SHOWN = "layers.0.mixer.in_proj"  # whose blocks are drawn
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

    def plain(x: Tensor, weight: Tensor, formats: Any, site: Site, keys: TokenKeys, step: int, *rest: Any, **options: Any) -> Tensor:
        y = linear(x, weight, formats, site, keys, step, *rest, **options)
        return note(site, x, weight, None, keys, step, y)

    def grouped(
        x: Tensor, weight: Tensor, sizes: Sequence[int], formats: Any, site: Site, keys: TokenKeys, step: int, **options: Any
    ) -> Tensor:
        return note(site, x, weight, sizes, keys, step, grouped_linear(x, weight, sizes, formats, site, keys, step, **options))

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
    microbatch = to_microbatch(batch, run.layout, step / recipe.total_steps, recipe.model.mtp_depths)
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
