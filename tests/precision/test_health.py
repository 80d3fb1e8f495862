"""Health metrics against their definitions, element by element in fp64, from codes and scales found by the functional interface."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from model.precision import mxfp8, nvfp4
from model.precision.formats import mxfp8 as mxfp8_format
from model.precision.formats.base import Format
from model.precision.formats.nvfp4 import seen
from model.precision.hadamard import FIXED, rotate
from model.precision.health import Health
from model.precision.linear import linear
from model.precision.operand import Encoding, Operand, Packed, Rows
from model.precision.site import Site, TokenKeys
from tests.precision.operands import MXFP8, NVFP4, REFERENCE, nvfp4_with, site, tensor


def by_definition(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, block: int, largest: float, bound: float) -> dict[str, float]:
    """x, q [rows, n] with blocks of `block` along rows, scale [rows, blocks]; largest: what a block holds at most, per unit of scale."""
    xs, qs = x.double().numpy(), q.double().numpy()
    clipped = lost = nonzero = zero = saturated = blocks = 0
    exponents = []
    for i in range(len(xs)):
        for b in range(scale.shape[1]):
            s = float(scale[i, b])
            values, given = xs[i, b * block : (b + 1) * block], qs[i, b * block : (b + 1) * block]
            blocks += 1
            zero += s == 0 and bool((values != 0).any())
            saturated += s >= bound * (1 - 1e-6)
            if s > 0:
                exponents.append(math.floor(math.log2(s)))
            for v, g in zip(values, given, strict=True):
                nonzero += v != 0
                lost += v != 0 and g == 0
                clipped += abs(v) > abs(g) and abs(g) >= s * largest * (1 - 1e-6) and s > 0
    exponents.sort()
    result = {
        "sqnr_db": 10 * math.log10((xs**2).sum() / ((qs - xs) ** 2).sum()),
        "underflow": lost / nonzero,
        "clipped": clipped / xs.size,
        "bias": float((np.sign(xs) * (qs - xs)).sum() / np.abs(xs).sum()),
        "scale_zero": zero / blocks,
        "scale_saturated": saturated / blocks,
    }
    for name, share in (("scale_p05", 0.05), ("scale_p50", 0.5), ("scale_p95", 0.95)):
        result[name] = exponents[max(0, math.ceil(share * len(exponents)) - 1)]
    return result


def compare(metrics: dict[str, float], prefix: str, expected: dict[str, float]) -> None:
    ours = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=2e-5, abs=1e-9), name


def values(quantized: nvfp4.Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    return quantized.dequantize(), quantized.scales.view(torch.float8_e4m3fn).float()


def measure(health: Health, operand: str, x: torch.Tensor, rows: Rows, encoding: Encoding) -> torch.Tensor:
    """Quantises x and tells its health; returns its amax."""
    amax = REFERENCE.amax(x, rows, encoding)
    packed = REFERENCE.quantize(x, amax, rows, encoding, packed=True)
    assert isinstance(packed, Packed)
    found = Operand(packed, encoding.stored(rows), amax, 6 * encoding.bound)
    health.operand("m", operand, lambda: seen(x, found, rows, encoding, REFERENCE))
    return amax


@pytest.mark.parametrize("kind", ["normal", "heavy", "tiny_block", "zeros"])
def test_blocks_along_rows(kind: str) -> None:
    x = tensor(kind, (48, 80), 1.0, torch.float32, 1)
    health, rows = Health(), Rows((48,))
    health.start()
    amax = measure(health, "x", x, rows, Encoding("rows"))
    q, scale = values(nvfp4.quantize(x))
    # One unit of scale is worth amax / 2688 here.
    unit = float(amax) / 2688
    compare(health.finish(), "precision/m/x/", _in_units(by_definition(x, q, scale * unit, 16, 6.0, 448.0 * unit), unit, scale))


def _in_units(expected: dict[str, float], unit: float, scale: torch.Tensor) -> dict[str, float]:
    """Exponents of the stored scales, not of what they are worth."""
    exponents = sorted(math.floor(math.log2(s)) for s in scale.flatten().tolist() if s > 0)
    for name, share in (("scale_p05", 0.05), ("scale_p50", 0.5), ("scale_p95", 0.95)):
        expected[name] = exponents[max(0, math.ceil(share * len(exponents)) - 1)]
    return expected


@pytest.mark.parametrize("hadamard", [False, True])
def test_blocks_along_columns_of_groups(hadamard: bool) -> None:
    x = tensor("heavy", (27, 32), 1.0, torch.float32, 2)
    rows = Rows((5, 0, 22))
    health = Health()
    health.start()
    measure(health, "x_t", x, rows, Encoding("columns", rotation=FIXED if hadamard else None))
    metrics = health.finish()
    # Every group padded and quantised alone; sums over both.
    signal = noise = lost = nonzero = 0.0
    for start, stop in ((0, 5), (5, 27)):
        part = torch.nn.functional.pad(x[start:stop].T, (0, -(stop - start) % 16)).contiguous()
        q = nvfp4.quantize(part, hadamard=hadamard).dequantize()
        seen = rotate(part) if hadamard else part
        signal += float(seen.double().square().sum())
        noise += float((q.double() - seen.double()).square().sum())
        nonzero += float((seen != 0).sum())
        lost += float(((seen != 0) & (q == 0)).sum())
    assert metrics["precision/m/x_t/sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), rel=1e-5)
    assert metrics["precision/m/x_t/underflow"] == pytest.approx(lost / nonzero, rel=1e-6)


def test_tiles_and_4over6() -> None:
    w = tensor("normal", (32, 48), 0.02, torch.float32, 3)
    rows, health = Rows((32,)), Health()
    health.start()
    for operand, encoding in (("w", Encoding("tiles")), ("w6", Encoding("tiles", clipping="4over6_mae", bound=256.0))):
        measure(health, operand, w, rows, encoding)
    metrics = health.finish()
    options: dict[str, Any] = {"w": {}, "w6": {"clipping": "4over6_mae", "e4m3_bound": 256}}
    for operand, how in options.items():
        q = nvfp4.quantize(w, scaling="2d", **how).dequantize()
        noise = (q.double() - w.double()).square().sum()
        assert metrics[f"precision/m/{operand}/sqnr_db"] == pytest.approx(
            float(10 * torch.log10(w.double().square().sum() / noise)), rel=1e-5
        )
        # Six tiles, of which one holds the largest element and has the largest scale.
        assert metrics[f"precision/m/{operand}/scale_saturated"] == pytest.approx(1 / 6)


def test_mxfp8() -> None:
    x = tensor("heavy", (16, 96), 1.0, torch.float32, 4)
    quantized = mxfp8.quantize(x)
    health = Health()
    health.start()
    rows = Rows((16,))
    health.operand("m", "x", lambda: mxfp8_format.seen(x, Operand(quantized, rows), rows))
    scale = torch.exp2(quantized.exponents.float() - mxfp8.BIAS)
    compare(health.finish(), "precision/m/x/", by_definition(x, quantized.dequantize(), scale, 32, 448.0, 2.0**127))


def test_gradient_and_residual() -> None:
    health = Health()
    dw = torch.tensor([[0.0, 1.0, -0.0, 2.0]])
    health.gradient("m", dw)  # not started: nothing
    x = torch.zeros(6, 2, 4)
    x[..., 0] = 1.0
    x[4, 1, 3] = -9.0
    health.start()
    health.gradient("m", dw)
    health.gradient("m", torch.ones(4))  # the second microbatch does not count
    health.residual("layers.3", x, 12)
    metrics = health.finish()
    rms = math.sqrt((12 + 81) / 48)
    assert metrics == {
        "precision/m/wgrad/zero": 0.5,
        "residual/layers.3/rms": pytest.approx(rms),
        "residual/layers.3/outlier_ratio": pytest.approx(9 / rms),
        "residual/layers.3/outlier_position": 16,
        "residual/layers.3/outlier_feature": 3,
    }
    assert health.finish() == {}


def test_only_the_modules_asked_for() -> None:
    health = Health(("layers.1.*",))
    health.start()
    for module in ("layers.1.mixer.in_proj", "layers.2.mixer.in_proj"):
        health.gradient(module, torch.ones(2))
    assert list(health.finish()) == ["precision/layers.1.mixer.in_proj/wgrad/zero"]


@pytest.mark.parametrize("form", [NVFP4, nvfp4_with(weight_scaling="1d"), MXFP8], ids=repr)
def test_weights_are_measured_whether_or_not_they_were_quantised_before(form: Format) -> None:
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn(32, 32, generator=generator), torch.randn(32, 32, generator=generator).requires_grad_()
    measured = []
    for evaluated_first in (False, True):
        here, index = site(), torch.arange(32)

        def step(here: Site = here, index: torch.Tensor = index) -> None:
            linear(x.clone().requires_grad_(), w, (form,) * 3, here, TokenKeys(index, index), 0).sum().backward()

        if evaluated_first:
            step()
        here.health.start()
        step()
        measured.append(here.health.finish())
    assert measured[0] == measured[1]
    assert "precision/m/w/sqnr_db" in measured[0]
    assert ("precision/m/w_t/sqnr_db" in measured[0]) == (form != NVFP4)
