"""The published sizes, counted on the real modules without allocating them."""

import pytest
import yaml

from model.config import ModelConfig
from model.count import count, linear_modules, on_meta
from model.moe import MoESizes
from train.recipe.load import RECIPES


def config(name: str) -> ModelConfig:
    return ModelConfig.of(**yaml.safe_load((RECIPES / "model" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "parameters", "active", "mtp"),
    [
        ("nemotron3_nano", "31.58", "3.58", "0.00"),
        ("nemotron3_super", "120.67", "12.77", "2.94"),
        ("nemotron3_ultra", "549.31", "56.06", "11.22"),
        ("nemotron3_5_lightning", "31.58", "3.58", "1.34"),
    ],
)
def test_published_sizes_to_the_digit(name: str, parameters: str, active: str, mtp: str) -> None:
    counted = count(config(name))
    assert [f"{value / 1e9:.2f}" for value in (counted.parameters, counted.active, counted.mtp)] == [parameters, active, mtp]


def test_nothing_is_allocated() -> None:
    assert all(param.is_meta for param in on_meta(config("nemotron3_ultra")).parameters())


def test_forward_flops_are_twice_the_active_weights_of_linear_layers() -> None:
    tiny = config("tiny")
    moe = tiny.sizes(MoESizes)
    model = on_meta(tiny)
    expected = 0.0
    for name, param in model.named_parameters():
        if param.dim() < 2 or "conv" in name or name.startswith("embeddings"):
            continue
        share = moe.top_k / moe.experts if ".experts." in name else 1.0
        repeats = 3 if name.startswith("lm_head") else 2 if name.startswith("mtp.") else 1
        expected += 2 * param.numel() * share * repeats
    assert sum(module.flops for module in linear_modules(tiny)) == pytest.approx(expected)
