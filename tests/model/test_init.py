"""Initial weights depend on the seed and the stored tensor's name, never on the layout."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from model.attention import Attention
from model.context import ModelContext
from model.embedding import Embedding
from model.linear import Linear
from model.mamba import MambaMixer, MambaSizes
from model.mlp import MLP
from model.norm import RMSNorm
from model.precision.policy import Policy, PrecisionConfig
from parallel.layout import Layout, ParallelConfig
from parallel.shards import pieces_of
from tests.model.build import CONFIG


def modules(size: int = 1, rank: int = 0, seed: int = 5) -> list[nn.Module]:
    layout = dataclasses.replace(Layout.alone(ParallelConfig(tensor=size)), tensor_size=size, tensor_rank=rank)
    context = ModelContext(CONFIG, layout, Policy(PrecisionConfig(), 3), seed, torch.float32, torch.device("cpu"))
    return [
        MambaMixer(context, "layers.0.mixer"),
        Attention(context, "layers.1.mixer"),
        MLP(context, "layers.2.mixer", 64),
        Linear(context, "replicated", 32, 16, "replicated", std=0.3),
        RMSNorm(context, "norm_f"),
        Embedding(context),
    ]


def stored(size: int = 1, seed: int = 5) -> dict[str, torch.Tensor]:
    """Every stored tensor, put together from all ranks."""
    tensors: dict[str, torch.Tensor] = {}
    for rank in range(size):
        for module in modules(size, rank, seed):
            for param in module.parameters():
                for piece in pieces_of(param):
                    whole = tensors.setdefault(piece.name, torch.full(piece.shape, torch.nan))
                    part = param.detach()[piece.local]
                    whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, part.shape, strict=True))] = part
    return tensors


@pytest.mark.parametrize("size", [2])
def test_the_same_on_any_layout(size: int) -> None:
    alone, split = stored(), stored(size)
    assert alone.keys() == split.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, split[name]), name


def test_names_and_distributions() -> None:
    tensors = stored()
    mixer = "layers.0.mixer."
    sizes = CONFIG.sizes(MambaSizes)
    inner = sizes.mamba_heads * sizes.mamba_head_dim
    expected = {
        "embeddings.weight": 0.1,
        f"{mixer}in_proj.weight": 0.1,
        f"{mixer}out_proj.weight": 0.1 / math.sqrt(6),
        f"{mixer}conv1d.weight": 0.5 / math.sqrt(3),
        f"{mixer}conv1d.bias": 0.5 / math.sqrt(3),
        "layers.1.mixer.q_proj.weight": 0.1,
        "layers.1.mixer.k_proj.weight": 0.1,
        "layers.1.mixer.v_proj.weight": 0.1,
        "layers.1.mixer.o_proj.weight": 0.1 / math.sqrt(6),
        "layers.2.mixer.up_proj.weight": 0.1,
        "layers.2.mixer.down_proj.weight": 0.1 / math.sqrt(6),
        "replicated.weight": 0.3,
    }
    constants = {f"{mixer}D", f"{mixer}norm.weight", "norm_f.weight"}
    assert tensors.keys() == expected.keys() | constants | {f"{mixer}A_log", f"{mixer}dt_bias"}
    for name, std in expected.items():
        count = tensors[name].numel()
        assert abs(tensors[name].std() / std - 1) < 5 / math.sqrt(2 * count), name
        assert abs(tensors[name].mean()) < 5 * std / math.sqrt(count), name
    for name in constants:
        assert (tensors[name] == 1).all(), name
    a = tensors[f"{mixer}A_log"].exp()
    assert 1 <= a.min() < a.max() <= 16
    steps = nn.functional.softplus(tensors[f"{mixer}dt_bias"])
    assert 0.999e-3 < steps.min() < steps.max() < 0.1001
    assert tensors[f"{mixer}conv1d.weight"].shape == (inner + 64, 1, 4)
    assert tensors[f"{mixer}in_proj.weight"].shape == (2 * inner + 64 + 8, 32)


def test_seed_and_name_make_the_values() -> None:
    first, again, other = stored(), stored(), stored(seed=6)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if tensor.unique().numel() > 1:
            assert not torch.equal(tensor, other[name]), name
    assert not torch.equal(first["layers.1.mixer.k_proj.weight"], first["layers.1.mixer.v_proj.weight"])
