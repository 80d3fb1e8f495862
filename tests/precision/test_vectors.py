"""Every record of Transformer Engine's own reference quantizer and GEMM, byte for byte."""

from typing import Any, Literal

import numpy as np
import pytest
import torch

from model.precision.backend import Backend
from model.precision.backends.cpu import FusedCPU
from model.precision.certify.matrix import quantize as through
from model.precision.certify.vectors import DIRECTORY, Vectors
from model.precision.hadamard import FIXED
from model.precision.linear import linear
from model.precision.nvfp4 import GRID, Quantized, quantize, round_e2m1_stochastic
from model.precision.site import TokenKeys
from tests.precision.operands import REFERENCE, nvfp4_with, site

VECTORS = Vectors()
RECORDS, ARRAYS, QUANTIZED = VECTORS.records, VECTORS.arrays, VECTORS.quantized
field, options = VECTORS.field, VECTORS.options


def assert_equal(ours: Quantized, record: str, suffix: str) -> None:
    assert torch.equal(ours.codes, field(record, f"qdata{suffix}"))
    assert torch.equal(ours.scales, field(record, f"qscale{suffix}"))
    assert torch.equal(ours.amax.flatten(), field(record, "amax_col" if suffix else "amax_row").flatten())
    assert torch.equal(ours.dequantize(), field(record, f"deq{suffix}"))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("record", QUANTIZED)
def test_codes_scales_amax_and_values(record: str, transposed: bool) -> None:
    x = field(record, "input")
    x = x.T.contiguous() if transposed else x
    if RECORDS[record].get("error"):
        # A ragged tensor is refused where the reference fails on it: in 2D both ways, with the rotation along tokens.
        if RECORDS[record]["kind"] == "2d" or transposed:
            with pytest.raises(ValueError, match="16"):
                quantize(x, **options(record, transposed=transposed))
        return
    assert_equal(quantize(x, **options(record, transposed=transposed)), record, "_t" if transposed else "")


def test_all_records_are_covered() -> None:
    assert len(QUANTIZED) == 51
    assert sum(bool(RECORDS[name].get("error")) for name in QUANTIZED) == 3


@pytest.mark.parametrize("scaling", ["1d", "2d"])
@pytest.mark.parametrize("bound", [448, 256])
@pytest.mark.parametrize("error", ["mae", "mse"])
def test_four_over_six_rounds_where_the_reference_does(error: str, bound: int, scaling: Literal["1d", "2d"]) -> None:
    arrays = np.load(DIRECTORY / "nvfp4_4over6_vectors.npz")
    x = torch.from_numpy(arrays["input"]).view(torch.bfloat16)
    codes, scales = (torch.from_numpy(arrays[f"{error}_{bound}_{scaling}/{name}"]) for name in ("qdata", "qscale"))
    for backend in (REFERENCE, FusedCPU()):
        ours = through(backend, x, scaling=scaling, clipping=f"4over6_{error}", e4m3_bound=bound)
        assert torch.equal(ours.scales, scales) and torch.equal(ours.codes, codes), backend.name


@pytest.mark.parametrize(
    "way", [{}, {"row_scaled": True}, {"clipping": "4over6_mae"}, {"scaling": "2d"}, {"hadamard": True}, {"random": 1}], ids=str
)
@pytest.mark.parametrize("backend", [REFERENCE, FusedCPU()], ids=lambda backend: backend.name)
def test_a_code_of_zero_has_the_sign_of_the_product(backend: Backend, way: dict[str, Any]) -> None:
    """The reference takes the sign from x * enc: beside an element of 1e38, -1e-9 is +0 and -1 is -0."""
    x = torch.zeros(16, 32)
    x[:, 0], x[:, 1], x[:, 2], x[:, 3], x[:, 16] = 1e38, -1e-9, -1.0, -0.0, -1e38
    options = {"random_bits": torch.zeros(16, 32, dtype=torch.uint8)} if "random" in way else way
    if "hadamard" in way:
        x = (x.unflatten(1, (2, 16)) @ FIXED.matrix().T).flatten(1)  # rotated back, up to rounding
    codes = through(backend, x, **options).codes
    assert torch.equal(codes, quantize(x, **options).codes)
    if "hadamard" not in way:
        assert [int(codes[0, 0]) >> 4, int(codes[0, 1])] == [0, 8]


def test_grid_and_rotation() -> None:
    assert torch.equal(torch.tensor(GRID + tuple(-v for v in GRID)), torch.from_numpy(ARRAYS["_e2m1_values"]))
    assert torch.equal(FIXED.matrix().bfloat16(), torch.from_numpy(ARRAYS["_rht_matrix_bf16"]).view(torch.bfloat16))


def test_stochastic_rounding_of_every_byte() -> None:
    x, table = field("_sr_table", "x"), field("_sr_table", "table")
    every = torch.arange(256, dtype=torch.uint8).expand(len(x), 256)
    ours = round_e2m1_stochastic(x.clamp(-6, 6)[:, None].expand(-1, 256).contiguous(), every)
    assert torch.equal(ours, table.float())


@pytest.mark.parametrize("record", ["randn_bf16_128x256_1d", "grad_like_1e-6_rht"])
def test_stochastic_rounding_has_the_expectation_of_the_reference(record: str) -> None:
    # Not a sample: all 256 bytes for every element, so mean and variance are exact. The record holds the row-wise operand.
    x = field(record, "input")
    every = torch.stack(
        [quantize(x, random_bits=torch.full(x.shape, byte, dtype=torch.uint8)).dequantize().double() for byte in range(256)]
    )
    statistics = f"_sr_expect_{record}"
    expected, deviation = field(statistics, "E_deq").double(), field(statistics, "std_deq").double()
    scale = expected.abs().max()
    assert (every.mean(0) - expected).abs().max() <= 1e-6 * scale
    assert (every.std(0, correction=0) - deviation).abs().max() <= 1e-5 * scale
    # The bias is known and not hidden: block maxima that scale above 6 clip.
    clipped = field(statistics, "clipped")
    assert 0.01 < clipped.float().mean() < 0.08


def test_gemms() -> None:
    x, w, dy = (field("_gemm_fprop_dgrad_wgrad", name) for name in ("x", "w", "dy"))
    form = nvfp4_with(stochastic_rounding=False)
    keys = TokenKeys(torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)))
    inputs, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
    weight.main_grad = torch.zeros(w.shape)  # type: ignore[attr-defined]
    y = linear(inputs, weight, (form, form, form), site(), keys, 0)
    y.backward(dy)
    # dx in fp32: without the rotation, an operand's dtype does not enter.
    wide = x.float().requires_grad_()
    wide_y = linear(wide, w.float(), (form, form, form), site(), keys, 0)
    wide_y.backward(dy.float())
    for name, ours in (("y", wide_y), ("dx", wide.grad), ("dw", weight.main_grad)):  # type: ignore[attr-defined]
        assert ours is not None
        reference = field("_gemm_fprop_dgrad_wgrad", f"{name}_torch.float32")
        assert (ours - reference).abs().max() <= 1e-6 * reference.abs().max(), name
    assert torch.equal(y, field("_gemm_fprop_dgrad_wgrad", "y_torch.bfloat16"))
    assert inputs.grad is not None and torch.equal(inputs.grad, field("_gemm_fprop_dgrad_wgrad", "dx_torch.bfloat16"))
