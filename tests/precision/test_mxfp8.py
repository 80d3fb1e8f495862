"""MXFP8 against an independent computation in fp64 with explicit rounding."""

import math

import pytest
import torch

from model.precision.mxfp8 import biased_exponent, quantize


def e4m3(x: float) -> float:
    """Nearest E4M3 value, ties to even, of |x| <= 448, by the definition of the format."""
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))), -6)
    step = 2.0 ** (exponent - 3)
    return round(x / step) * step


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20, 1e-38])
@pytest.mark.parametrize("columns", [32, 96, 50])
def test_values(scale: float, columns: int) -> None:
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)) * scale
    x[1, :20] = 0
    x[2] = 0
    quantized = quantize(x)
    values = quantized.dequantize().double()
    for row in range(5):
        for start in range(0, columns, 32):
            block = x[row, start : start + 32].double()
            amax = float(block.abs().max())
            byte = int(quantized.exponents[row, start // 32])
            if amax == 0:
                assert byte == 0 and (values[row, start : start + 32] == 0).all()
                continue
            ratio = float(torch.tensor(amax, dtype=torch.float32) * torch.tensor(1 / 448, dtype=torch.float32))
            exponent = max(math.ceil(math.log2(ratio)), -127)
            assert byte == exponent + 127
            for ours, element in zip(values[row, start : start + 32].tolist(), block.tolist(), strict=True):
                assert ours == e4m3(element / 2.0**exponent) * 2.0**exponent


def test_the_scale_is_rounded_up_so_that_nothing_saturates() -> None:
    amax = torch.tensor([448.0, 449.0, 896.0, 1.0, 0.0])
    assert (biased_exponent(amax) - 127).tolist() == [0, 1, 1, -8, -127]
