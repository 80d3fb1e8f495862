"""Norms against transformers' NemotronH, in fp32 and bf16."""

import pytest
import torch
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm, NemotronHRMSNormGated

from model.norm import RMSNorm, gated_group_norm
from tests.model.build import CONFIG, disturb, open_context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_equals_nemotron_h(dtype: torch.dtype) -> None:
    with open_context() as context:
        ours = RMSNorm(context, "n")
        disturb(ours)
        theirs = NemotronHRMSNorm(CONFIG.hidden_size, CONFIG.norm_eps)
        theirs.load_state_dict(ours.state_dict())
        x = (torch.randn(7, 2, CONFIG.hidden_size) * 1e-2).to(dtype)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # one bf16 rounding
        torch.testing.assert_close(ours(x), theirs(x), atol=0, rtol=tolerance)


def test_gated_norm_and_its_gradients_equal_nemotron_h_in_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate, dy = (torch.randn(7, 2, 48, generator=generator) for _ in range(3))
    weight = torch.randn(48, generator=generator)
    fast = [t.clone().requires_grad_() for t in (x, gate, weight)]
    y = gated_group_norm(fast[0], fast[1], fast[2], group_size=16, eps=1e-5)
    theirs = NemotronHRMSNormGated(48, group_size=16, eps=1e-5)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    torch.testing.assert_close(y, theirs(x, gate), atol=1e-6, rtol=1e-5)

    exact = [t.double().requires_grad_() for t in (x, gate, weight)]
    gated = (exact[0] * torch.nn.functional.silu(exact[1])).unflatten(-1, (3, 16))
    expected = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * exact[2]
    y.backward(dy)
    expected.backward(dy.double())
    for ours, reference in zip(fast, exact, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), reference.grad, atol=5e-6, rtol=1e-5)


def test_gated_norm_keeps_bf16_and_computes_in_fp32() -> None:
    x, gate = (torch.randn(5, 2, 32).bfloat16() for _ in range(2))
    weight = torch.randn(32)
    y = gated_group_norm(x, gate, weight.bfloat16(), 16, 1e-5)
    assert y.dtype == torch.bfloat16
    exact = gated_group_norm(x.float(), gate.float(), weight.bfloat16().float(), 16, 1e-5)
    torch.testing.assert_close(y, exact.bfloat16(), atol=0, rtol=0)
