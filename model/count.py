"""Parameters, active parameters and GEMM FLOPs, counted on the real modules and by what their mixers declare: built on the meta device, nothing
is allocated."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from model.config import ModelConfig
from model.context import LinearUse, ModelContext
from model.hybrid import HybridModel
from model.layer import Layer
from model.mixer import MIXERS
from model.precision.policy import Policy, PrecisionConfig
from parallel.layout import Layout


@dataclass(frozen=True)
class LinearModule:
    """A linear layer as one rank holds it. rows, columns: of its weight there (of one expert); flops: forward FLOPs per token of the whole
    layer, experts at top_k; sequence_split: its operands hold only this rank's part of the sequence; routed: an expert."""

    name: str
    rows: int
    columns: int
    flops: float
    sequence_split: bool
    routed: bool


@dataclass(frozen=True)
class OtherProducts:
    """Matrix products of a module that are no linear layer. flops: forward, per token; fp32: whatever precision.compute is."""

    what: str
    module: str
    flops: float
    fp32: bool


@dataclass(frozen=True)
class Count:
    """parameters and active (per token), MTP apart; mtp: parameters of the MTP blocks."""

    parameters: int
    active: int
    mtp: int


def on_meta(config: ModelConfig) -> HybridModel:
    """The whole model on one imaginary rank, without storage."""
    context = ModelContext(config, Layout.alone(), Policy(PrecisionConfig(), len(config.layers)), 0, torch.float32, torch.device("meta"))
    return HybridModel(context)


def count(config: ModelConfig) -> Count:
    """A token activates everything but, for instance, the routed experts it does not visit."""
    model = on_meta(config)
    shares: dict[int, float] = {}
    for layer in model.modules():
        if isinstance(layer, Layer):
            sizes = config.sizes(layer.kind.sizes)
            shares |= {id(param): layer.kind.active_share(sizes, name) for name, param in layer.mixer.named_parameters()}
    main = mtp = active = 0
    for name, param in model.named_parameters():
        if name.startswith("mtp."):
            mtp += param.numel()
            continue
        main += param.numel()
        active += round(param.numel() * shares.get(id(param), 1.0))
    return Count(main, active, mtp)


def linear_modules(config: ModelConfig, tensor: int = 1, expert_tensor: int = 1) -> list[LinearModule]:
    """Every linear layer in the order of the model; shared MTP blocks once, with the FLOPs of all their depths. tensor, expert_tensor: ranks of
    these groups."""
    rows = {"rows": tensor, "expert_rows": expert_tensor}
    columns = {"columns": tensor, "expert_columns": expert_tensor}
    return [
        LinearModule(
            use.module,
            use.rows // rows.get(use.spread, 1),
            use.columns // columns.get(use.spread, 1),
            use.flops * _uses(use.module, config),
            use.spread == "everywhere",
            use.spread in ("expert_rows", "expert_columns"),
        )
        for use in _linears(config)
    ]


@lru_cache(maxsize=4)
def _linears(config: ModelConfig) -> tuple[LinearUse, ...]:
    return tuple(on_meta(config).context.linears)


def _uses(module: str, config: ModelConfig) -> int:
    """How often a forward pass of the whole model, MTP included, comes through a module."""
    if module == "lm_head":
        return 1 + config.mtp_depths
    return config.mtp_depths if config.mtp_shared and module.startswith("mtp.") else 1


def other_products(config: ModelConfig, sequence_length: int) -> list[OtherProducts]:
    """The matrix products outside linear layers, those of attention and SSD for instance, by module."""
    blocks = [(f"layers.{i}.mixer", letter) for i, letter in enumerate(config.layers)]
    for block in range(config.mtp_blocks):
        blocks += [(f"mtp.layers.{block}.layers.{j}.mixer", letter) for j, letter in enumerate(config.parsed.mtp[block])]
    return [
        OtherProducts(products.what, module, products.flops * _uses(module, config), products.fp32)
        for module, letter in blocks
        for products in MIXERS[letter].products(config.sizes(MIXERS[letter].sizes), sequence_length)
    ]
