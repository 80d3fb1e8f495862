"""The three GEMMs of a linear layer, and of routed experts, against explicit quantisation and fp64 products."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.precision import hadamard, mxfp8, nvfp4, philox
from model.precision.backends.cpu import FusedCPU
from model.precision.formats.base import Format
from model.precision.linear import grouped_linear, linear
from model.precision.site import TokenKeys
from tests.precision.operands import BF16, FP32, MXFP8, NVFP4, REFERENCE, nvfp4_with, site

SEED, STEP = 5, 9


def keys(rows: int) -> TokenKeys:
    return TokenKeys(torch.arange(rows) // 8, torch.arange(rows) % 8)


def values(x: torch.Tensor, form: Format, **how: object) -> torch.Tensor:
    """x as `form` stores it along its last dimension, fp64."""
    if form.name == "fp32":
        return x.double()
    if form.name == "bf16":
        return x.bfloat16().double()
    if form.name == "mxfp8":
        return mxfp8.quantize(x).dequantize().double()
    quantized = nvfp4.quantize(x, **how)  # type: ignore[arg-type]
    return quantized.dequantize().double()


def bits(operand: str, rows: int, features: int, expert: int | None = None) -> torch.Tensor:
    where = keys(rows)
    return philox.random_bytes(
        philox.stream_key(SEED, "m", operand),
        sample=where.sample,
        position=where.position,
        step=STEP,
        features=features,
        expert=None if expert is None else torch.full((rows,), expert),
    )


def expected(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, forms: tuple[Format, Format, Format]) -> list[torch.Tensor]:
    fprop, dgrad, wgrad = forms
    weight = {"scaling": "2d"}
    y = values(x, fprop) @ values(w, fprop, **weight).T
    noise = {"random_bits": bits("dy", *dy.shape)} if dgrad.name == "nvfp4" else {}
    dx = values(dy, dgrad, **noise) @ values(w.T.contiguous(), dgrad, **weight).T
    turned = {"hadamard": True} if wgrad.name == "nvfp4" else {}
    noise = {"random_bits": bits("dy_t", *dy.shape).T} if wgrad.name == "nvfp4" else {}
    dw = values(dy.T, wgrad, **turned, **noise) @ values(x.T, wgrad, **turned).T
    return [y, dx, dw]


@pytest.mark.parametrize("fprop", [FP32, BF16, MXFP8, NVFP4], ids=str)
@pytest.mark.parametrize("dgrad", [FP32, NVFP4], ids=str)
@pytest.mark.parametrize("wgrad", [BF16, MXFP8, NVFP4], ids=str)
def test_each_gemm_runs_in_its_own_format(fprop: Format, dgrad: Format, wgrad: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*shape, generator=generator) for shape in ((64, 48), (32, 48), (64, 32)))
    inputs, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = linear(inputs, weight, (fprop, dgrad, wgrad), site(), keys(64), STEP)
    y.backward(dy)
    for name, ours, exact in zip("y dx dw".split(), (y, inputs.grad, weight.grad), expected(x, w, dy, (fprop, dgrad, wgrad)), strict=True):
        assert ours is not None
        assert (ours.double() - exact).abs().max() <= 2e-6 * exact.abs().max(), name


def test_weight_gradients_accumulate_in_fp32_in_main_grad() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(32, 16, generator=generator).bfloat16(), torch.randn(16, 16, generator=generator).bfloat16().requires_grad_()
    w.main_grad = torch.zeros(16, 16)  # type: ignore[attr-defined]
    total = torch.zeros(16, 16, dtype=torch.float64)
    for _ in range(3):
        dy = torch.randn(32, 16, generator=generator).bfloat16()
        linear(x, w, (BF16, BF16, BF16), site(), keys(32), STEP).backward(dy)
        total += dy.double().T @ x.double()
    assert w.grad_added_to_main_grad and w.grad is not None and not w.grad.any()  # type: ignore[attr-defined]
    torch.testing.assert_close(w.main_grad.double(), total, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("forms", [(FP32,) * 3, (NVFP4,) * 3, (MXFP8,) * 3, (NVFP4, BF16, NVFP4)], ids=lambda f: "-".join(map(str, f)))
@pytest.mark.parametrize("counts", [[16, 32, 16], [5, 0, 40, 19], [0, 0, 64], [64]], ids=str)  # no token at all: below
def test_every_expert_is_an_operand_of_its_own(forms: tuple[Format, Format, Format], counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(64, 32, generator=generator), torch.randn(64, 48, generator=generator)
    x *= torch.linspace(0.1, 4, 64)[:, None]  # amaxes differ
    w = torch.randn(len(counts), 48, 32, generator=generator)
    inputs, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = grouped_linear(inputs, weight, counts, forms, site(first_expert=7), keys(64), STEP)
    y.backward(dy)
    assert inputs.grad is not None and weight.grad is not None
    start = 0
    for expert, size in enumerate(counts):
        rows = slice(start, start + size)
        start += size
        if size == 0:
            assert not weight.grad[expert].any()
            continue
        fprop, dgrad, wgrad = forms
        exact = values(x[rows], fprop) @ values(w[expert], fprop, scaling="2d").T
        torch.testing.assert_close(y[rows].double(), exact, rtol=1e-4, atol=2e-6 * float(exact.abs().max()))
        noise = bits("dy", 64, 48, 7 + expert)[rows]
        how = {"random_bits": noise} if dgrad.name == "nvfp4" else {}
        exact = values(dy[rows], dgrad, **how) @ values(w[expert].T.contiguous(), dgrad, scaling="2d").T
        torch.testing.assert_close(inputs.grad[rows].double(), exact, rtol=1e-4, atol=2e-6 * float(exact.abs().max()))
        block = {"nvfp4": 16, "mxfp8": 32}.get(wgrad.name, 1)
        padding = (0, 0, 0, -size % block)
        padded_dy, padded_x = (torch.nn.functional.pad(t[rows], padding) for t in (dy, x))
        how, both = {}, {}
        if wgrad.name == "nvfp4":
            how = {"random_bits": torch.nn.functional.pad(bits("dy_t", 64, 48, 7 + expert)[rows], padding).T}
            both = {"hadamard": True}
        exact = values(padded_dy.T, wgrad, **both, **how) @ values(padded_x.T, wgrad, **both).T
        torch.testing.assert_close(weight.grad[expert].double(), exact, rtol=1e-4, atol=2e-6 * float(exact.abs().max()))


def test_the_rotation_leaves_the_product_over_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(8, 64, generator=generator, dtype=torch.float64), torch.randn(6, 64, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(hadamard.rotate(a) @ hadamard.rotate(b).T, a @ b.T, rtol=1e-5, atol=1e-5)


def test_shapes_the_format_cannot_take_name_the_module() -> None:
    x, w = torch.randn(32, 32), torch.randn(24, 32)
    with pytest.raises(ValueError, match=r"layers.1.mixer.gate, whose weight on one rank is 24 x 32, but 2d scaling needs multiples of 16"):
        linear(x, w, (NVFP4,) * 3, site("layers.1.mixer.gate"), keys(32), 0)
    x, w = torch.randn(24, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    with pytest.raises(ValueError, match=r"lm_head, which gets 24 tokens of a microbatch on one rank"):
        linear(x, w, (NVFP4,) * 3, site("lm_head"), keys(24), 0)


def test_four_over_six_and_row_scaling_reach_the_forward_operands() -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(32, 32, generator=generator), torch.randn(32, 32, generator=generator)
    y = linear(x, w, (nvfp4_with(clipping="4over6_mse", e4m3_bound=256),) * 3, site(), keys(32), 0)
    how = {"clipping": "4over6_mse", "e4m3_bound": 256}
    exact = values(x, NVFP4, **how) @ values(w, NVFP4, scaling="2d", **how).T
    assert (y.double() - exact).abs().max() <= 2e-6 * exact.abs().max()
    y = linear(x, w, (nvfp4_with(row_scaled=True),) * 3, site(), keys(32), 0)
    exact = values(x, NVFP4, row_scaled=True) @ values(w, NVFP4, scaling="2d").T
    assert (y.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("backend", [REFERENCE, FusedCPU()], ids=lambda b: b.name)
@pytest.mark.parametrize("form", [NVFP4, MXFP8, BF16], ids=str)
def test_experts_without_any_token(form: Format, backend: Any) -> None:
    x, w = torch.zeros(0, 32, requires_grad=True), torch.ones(2, 48, 32, requires_grad=True)
    here = site(first_expert=0, backend=backend)
    here.health.start()
    y = grouped_linear(x, w, [0, 0], (form,) * 3, here, keys(0), STEP)
    assert y.shape == (0, 48)
    y.backward(torch.zeros(0, 48))
    assert x.grad is not None and x.grad.shape == (0, 32) and w.grad is not None and not w.grad.any()
    assert not any("/x" in name or "/dy" in name for name in here.health.finish())


def test_depths_that_share_a_module_draw_different_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    x, w, dy = (torch.randn(*shape, generator=generator) for shape in ((32, 32), (32, 32), (32, 32)))
    gradients = []
    for depth in (0, 1, 2, 1):
        inputs = x.clone().requires_grad_()
        linear(inputs, w, (NVFP4,) * 3, site(), replace(keys(32), depth=depth), STEP).backward(dy)
        assert inputs.grad is not None
        gradients.append(inputs.grad)
    assert torch.equal(gradients[1], gradients[3])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (gradients[a] != gradients[b]).float().mean() > 0.5
