"""Every layer on two ranks of a tensor group equals the same layer on one: outputs, and gradients of all tensors."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from model.attention import Attention
from model.context import ModelContext
from model.embedding import Embedding, summed_cross_entropy
from model.init import initialize, normal
from model.linear import Linear, Mode
from model.mamba import MambaMixer
from model.mlp import MLP
from model.norm import RMSNorm
from model.precision.policy import PrecisionConfig
from parallel.layout import ParallelConfig
from parallel.shards import Section, pieces_of, spread_of
from tests.model.build import CONFIG, microbatch, open_context, packed
from tests.model.test_moe import CONFIG as ROUTED

LENGTH = 72


@dataclass(frozen=True)
class Part:
    """What one rank holds of a global tensor. total: parts at the same place are summed, as every rank saw only its
    own tokens; else they must agree."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: torch.Tensor
    total: bool = False


def gradients(module: nn.Module, context: ModelContext) -> list[Part]:
    parts = []
    for param in module.parameters():
        assert param.grad is not None
        flagged = spread_of(param) == "everywhere" and context.layout.sequence_parallel
        parts += [Part(p.name, p.shape, p.offset, param.grad[p.local].clone(), flagged) for p in pieces_of(param)]
    return parts


def merge(ranks: list[list[Part]]) -> dict[str, torch.Tensor]:
    """The global tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for part in (part for parts in ranks for part in parts):
        whole = tensors.setdefault(part.name, torch.full(part.shape, torch.nan))
        box = tuple(slice(o, o + n) for o, n in zip(part.offset, part.values.shape, strict=True))
        if part.total:
            whole[box] = whole[box].nan_to_num(0) + part.values
        else:
            assert (whole[box].isnan() | (whole[box] == part.values)).all(), f"ranks disagree about {part.name}"
            whole[box] = part.values
    for name, tensor in tensors.items():
        assert not tensor.isnan().any(), f"no rank holds all of {name}"
    return tensors


def mixers(rank: int, parallel: ParallelConfig, reset: bool) -> list[Part]:
    """Forward and backward of each kind of layer on this rank."""
    parts: list[Part] = []
    with open_context(parallel) as context:
        layout = context.layout
        documents = packed(LENGTH) if reset else None
        batch = microbatch(LENGTH, documents=documents)
        local = LENGTH // layout.tensor_size if layout.sequence_parallel else LENGTH
        first = layout.tensor_rank * local if layout.sequence_parallel else 0
        generator = torch.Generator().manual_seed(0)

        def everywhere(width: int) -> torch.Tensor:
            return torch.randn(LENGTH, 2, width, generator=generator)

        modules: dict[str, nn.Module] = {
            "mamba": MambaMixer(context, "mamba"),
            "attention": Attention(context, "attention"),
            "mlp": MLP(context, "mlp", 64),
            "replicated": Linear(context, "replicated", CONFIG.hidden_size, 48, "replicated", std=0.1),
            "norm": RMSNorm(context, "norm"),
        }
        for name, module in modules.items():
            for param in module.parameters():
                if param.dim() == 1:  # not at its initial value, the same on every layout
                    initialize(param, 99, normal(0.5))
            x = everywhere(CONFIG.hidden_size)[first : first + local].requires_grad_()
            y = module(x, batch) if name != "norm" else module(x)
            dy = everywhere(y.shape[-1])
            y.backward(dy[first : first + local])
            assert x.grad is not None
            parts.append(Part(f"{name} y", (LENGTH, *y.shape[1:]), (first, 0, 0), y.detach()))
            parts.append(Part(f"{name} dx", (LENGTH, *x.shape[1:]), (first, 0, 0), x.grad))
            parts += gradients(module, context)

        embedding = Embedding(context)
        head = Linear(context, "lm_head", CONFIG.hidden_size, CONFIG.vocab_size, "column", std=0.3)
        hidden = embedding(batch.tokens[0])
        hidden.retain_grad()
        valid = batch.loss_mask[1]
        loss = summed_cross_entropy(head(hidden * 5, batch), batch.labels[0], valid)
        loss.backward()
        parts.append(Part("loss", (), (), loss.detach()))
        parts.append(Part("hidden", (LENGTH, *hidden.shape[1:]), (first, 0, 0), hidden.detach()))
        parts += gradients(embedding, context)
        parts += gradients(head, context)
    return parts


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "no_sequence"])
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
def test_two_ranks_equal_one(ranks, sequence: bool, reset: bool) -> None:
    expected = merge([mixers(0, ParallelConfig(), reset)])
    result = merge(ranks(2)(mixers, ParallelConfig(tensor=2, sequence=sequence), reset))
    assert result.keys() == expected.keys()
    assert {"mamba.in_proj.weight", "mamba.A_log", "attention.k_proj.weight", "embeddings.weight"} <= result.keys()
    for name, tensor in expected.items():
        error = (result[name] - tensor).abs().max() / tensor.abs().max()
        assert error <= 2e-6, f"{name}: {error:.1e}"


def linears(rank: int, parallel: ParallelConfig, precision: PrecisionConfig) -> list[Part]:
    """One linear layer of every mode in a quantised format, with stochastic rounding."""
    parts: list[Part] = []
    with open_context(parallel, precision=precision) as context:
        layout = context.layout
        batch = microbatch(32)
        local = 32 // layout.tensor_size
        generator = torch.Generator().manual_seed(0)
        fused = [Section("column.a", 64), Section("column.b", 32)]
        modes: list[tuple[Mode, list[Section] | None, int]] = [
            ("column", fused, 96),
            ("row", None, 96),
            ("replicated", None, 96),
        ]
        for mode, sections, out in modes:
            layer = Linear(context, mode, 64, out, mode, std=0.1, sections=sections)
            x, dy = torch.randn(32, 2, 64, generator=generator), torch.randn(32, 2, out, generator=generator)
            tokens = slice(layout.tensor_rank * local, (layout.tensor_rank + 1) * local)
            runs = [(0, out)]
            x_offset, y_offset = (tokens.start, 0, 0), (tokens.start, 0, 0)
            if mode == "column":
                x = x[tokens]
                runs = [
                    (start + layout.tensor_rank * (rows // layout.tensor_size), rows // layout.tensor_size)
                    for start, rows in ((0, 64), (64, 32))
                ]
                dy = torch.cat([dy[..., a : a + n] for a, n in runs], dim=-1)
                y_offset = (0, 0, 0)
            elif mode == "row":
                width = 64 // layout.tensor_size
                x, dy = x[..., layout.tensor_rank * width : (layout.tensor_rank + 1) * width], dy[tokens]
                x_offset = (0, 0, layout.tensor_rank * width)
            else:
                x, dy = x[tokens], dy[tokens]
            x = x.contiguous().requires_grad_()
            y = layer(x, batch)
            y.backward(dy)
            assert x.grad is not None
            at = 0
            for a, n in runs:
                parts.append(Part(f"{mode} y", (32, 2, out), (*y_offset[:2], a), y[..., at : at + n].detach()))
                at += n
            parts.append(Part(f"{mode} dx", (32, 2, 64), x_offset, x.grad))
            parts += gradients(layer, context)
    return parts


def scopes(rank: int, expert: int) -> tuple[bool, bool]:
    """Whether plain and routed sites of this rank take the amaxes of the tensor group."""
    precision = PrecisionConfig(default="nvfp4", amax_scope="tensor_parallel")
    with open_context(ParallelConfig(tensor=2, expert=expert), config=ROUTED, precision=precision) as context:
        return context.site("a").amax_group is not None, context.site("b", first_expert=0).amax_group is not None


def test_different_experts_do_not_share_amaxes(ranks) -> None:
    assert ranks(2)(scopes, 1) == [(True, True)] * 2  # the same experts, each with some of their tokens
    assert ranks(2)(scopes, 2) == [(True, False)] * 2


def test_quantised_layers_on_two_ranks_equal_one(ranks) -> None:
    """With amaxes taken over the tensor group, a shard's values, scales and random bits are the whole tensor's."""
    precision = PrecisionConfig(default="nvfp4", amax_scope="tensor_parallel")
    expected = merge([linears(0, ParallelConfig(), precision)])
    result = merge(ranks(2)(linears, ParallelConfig(tensor=2), precision))
    exact = merge([linears(0, ParallelConfig(), PrecisionConfig(default="fp32"))])
    for name, tensor in expected.items():
        scale = tensor.abs().max()
        assert (result[name] - tensor).abs().max() <= 2e-6 * scale, name
        assert (exact[name] - tensor).abs().max() > 1e-3 * scale, f"{name} was not quantised"
