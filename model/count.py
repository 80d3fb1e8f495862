"""Parameters, active parameters and GEMM FLOPs, counted on the real modules: built on the meta device, nothing is allocated."""

from dataclasses import dataclass

import torch

from model.attention import attention_flops
from model.config import ModelConfig
from model.context import ModelContext
from model.hybrid import HybridModel
from model.linear import Linear
from model.moe import Experts
from model.precision.policy import Policy, PrecisionConfig
from model.ssd import ssd_flops
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
    """A token activates everything but the routed experts it does not visit."""
    model = on_meta(config)
    main = mtp = active = 0
    for name, param in model.named_parameters():
        if name.startswith("mtp."):
            mtp += param.numel()
            continue
        main += param.numel()
        share = 1.0
        if ".experts." in name:
            assert config.experts and config.top_k
            share = config.top_k / config.experts
        active += round(param.numel() * share)
    return Count(main, active, mtp)


def linear_modules(config: ModelConfig, tensor: int = 1) -> list[LinearModule]:
    """Every linear layer in the order of the model; shared MTP blocks once, with the FLOPs of all their depths."""
    model = on_meta(config)
    flops = {use.module: use.flops for use in model.context.linears}
    repeats = config.mtp_depths if config.mtp_shared else 1
    result = []
    for module in model.modules():
        if isinstance(module, Linear):
            rows, columns = module.weight.shape
            if module.mode == "column":
                rows //= tensor
            elif module.mode == "row":
                columns //= tensor
            result.append((module.name, rows, columns, module.mode == "replicated", False))
        elif isinstance(module, Experts):
            for kind in ("up_proj", "down_proj"):
                _, rows, columns = getattr(module, kind).shape
                result.append((f"{module.name}.{kind}", rows, columns, False, True))
    return [
        LinearModule(name, rows, columns, _flops(name, flops[name], config, repeats), split, routed)
        for name, rows, columns, split, routed in result
    ]


def _flops(name: str, flops: float, config: ModelConfig, repeats: int) -> float:
    if name == "lm_head":  # used by the LM loss and by every MTP depth
        return flops * (1 + config.mtp_depths)
    return flops * repeats if name.startswith("mtp.") else flops


def other_flops(config: ModelConfig, sequence_length: int) -> list[tuple[str, str, float]]:
    """(kind, module, forward FLOPs per token) of attention and SSD, which are no linear layers."""
    blocks = [(f"layers.{i}", letter, 1) for i, letter in enumerate(config.layers)]
    for block in range(config.mtp_blocks):
        repeats = config.mtp_depths if config.mtp_shared else 1
        blocks += [(f"mtp.layers.{block}.layers.{j}", letter, repeats) for j, letter in enumerate(config.parsed.mtp[block])]
    result = []
    for name, letter, repeats in blocks:
        if letter == "*":
            assert config.attention_heads and config.head_dim
            flops = attention_flops(sequence_length, config.attention_heads, config.head_dim)
            result.append(("attention", f"{name}.mixer", repeats * flops))
        elif letter == "M":
            assert config.mamba_heads and config.mamba_head_dim and config.mamba_state_size and config.mamba_groups
            flops = ssd_flops(
                config.mamba_heads,
                config.mamba_head_dim,
                config.mamba_state_size,
                config.mamba_groups,
                min(config.mamba_chunk_size, sequence_length),
            )
            result.append(("SSD", f"{name}.mixer", repeats * flops))
    return result
