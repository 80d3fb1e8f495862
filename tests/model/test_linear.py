"""Linear layers: formats by policy, identity of tokens, accounts, errors; several ranks in test_tensor_parallel."""

import dataclasses

import pytest
import torch

from model.batch import Microbatch
from model.context import ModelContext
from model.linear import Linear
from model.mamba import MambaMixer
from model.precision.policy import Policy, PrecisionConfig, Rule
from parallel.layout import Layout, ParallelConfig
from parallel.shards import Section, pieces_of
from tests.model.build import CONFIG, microbatch, open_context


def run(layer: Linear, batch: Microbatch, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x, batch)
    y.backward(dy)
    assert x.grad is not None and layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad


def test_each_gemm_runs_in_the_format_of_the_policy_at_its_time() -> None:
    rules = (
        Rule("nvfp4", modules=("a.*",), gemms=("dgrad",)),
        Rule("mxfp8", modules=("a.*",), gemms=("wgrad",), start=0.5),
    )
    with open_context(precision=PrecisionConfig(default="fp32", rules=rules)) as context:
        ruled, other = (Linear(context, name, 32, 48, "column", std=1.0) for name in ("a.up_proj", "b.up_proj"))
        other.weight = ruled.weight
        x, dy = torch.randn(16, 2, 32), torch.randn(16, 2, 48)
        batch = microbatch(16)
        y, dx, dw = run(ruled, batch, x, dy)
        y_exact, dx_exact, dw_exact = run(other, batch, x, dy)
        torch.testing.assert_close(y_exact, x @ other.weight.T)
        assert torch.equal(y, y_exact) and torch.equal(dw, dw_exact)
        assert 0.01 < (dx - dx_exact).norm() / dx_exact.norm() < 0.3
        late = dataclasses.replace(batch, progress=0.5)
        y, _, dw = run(ruled, late, x, dy)
        assert torch.equal(y, y_exact)
        assert 0.001 < (dw - dw_exact).norm() / dw_exact.norm() < 0.1


def test_random_bits_follow_sample_and_position_not_the_microbatch() -> None:
    """A token's input gradient does not depend on the other samples of its microbatch (equal amaxes given)."""
    with open_context(precision=PrecisionConfig(default="nvfp4")) as context:
        layer = Linear(context, "a", 32, 48, "column", std=1.0)
        generator = torch.Generator().manual_seed(0)
        x, dy = torch.randn(16, 2, 32, generator=generator), torch.randn(16, 2, 48, generator=generator)
        dy = torch.cat((dy, torch.full((1, 2, 48), 9.0)))[-16:]  # one amax for both samples
        both = microbatch(16)
        _, dx, _ = run(layer, both, x, dy)
        one = microbatch(16, 1, sample=both.sample[1:])
        _, alone, _ = run(layer, one, x[:, 1:], dy[:, 1:])
        assert torch.equal(dx[:, 1:], alone)
        for other in (dataclasses.replace(both, step=both.step + 1), dataclasses.replace(both, sample=both.sample + 1)):
            _, moved, _ = run(layer, other, x, dy)
            assert not torch.equal(moved, dx), other


def test_fused_sections_are_separate_pieces() -> None:
    with open_context() as context:
        layer = Linear(context, "m.ab", 32, 48, "column", std=1.0, sections=[Section("m.a", 16), Section("m.b", 32)])
        assert [(p.name, p.shape) for p in pieces_of(layer.weight)] == [("m.a", (16, 32)), ("m.b", (32, 32))]


def test_layers_are_counted_without_being_allocated() -> None:
    policy = Policy(PrecisionConfig(), 3)
    context = ModelContext(CONFIG, Layout.alone(), policy, 0, torch.bfloat16, torch.device("meta"))
    mixer = MambaMixer(context, "layers.0.mixer")
    assert all(param.is_meta for param in mixer.parameters())
    inner, shared, heads = 128, 32, 8
    rows = 2 * inner + 2 * shared + heads
    assert [(use.module, use.flops) for use in context.linears] == [
        ("layers.0.mixer.in_proj", 2.0 * 32 * rows),
        ("layers.0.mixer.out_proj", 2.0 * inner * 32),
    ]


@pytest.mark.parametrize(("mode", "features"), [("row", (33, 32)), ("column", (32, 33))])
def test_a_size_the_tensor_group_does_not_divide_is_refused(mode: str, features: tuple[int, int]) -> None:
    layout = dataclasses.replace(Layout.alone(ParallelConfig(tensor=2)), tensor_size=2)
    context = ModelContext(CONFIG, layout, Policy(PrecisionConfig(), 3), 0, torch.float32, torch.device("meta"))
    with pytest.raises(ValueError, match=r"up_proj.* 33 .*parallel.tensor=2 does not divide"):
        Linear(context, "up_proj", *features, mode, std=1.0)  # type: ignore[arg-type]
