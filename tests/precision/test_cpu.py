"""The fused CPU backend equals the reference bit for bit, and starts quickly."""

import subprocess
import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.precision.backends.cpu import FusedCPU
from model.precision.backends.reference import Reference
from model.precision.certify.matrix import quantize as through
from model.precision.hadamard import FIXED
from model.precision.nvfp4 import quantize
from model.precision.operand import Encoding, Packed, Rows
from tests.precision.operands import assert_equals_reference, tensor
from tests.precision.test_vectors import QUANTIZED, RECORDS, assert_equal, field, options

CPU = FusedCPU()
KINDS = ["normal", "heavy", "outlier", "zeros", "ties", "denormal", "tiny_block"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [1.0, 1e-30, 1e-6, 1e30]


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("record", [name for name in QUANTIZED if not RECORDS[name].get("error")])
def test_the_vectors_of_transformer_engine(record: str, transposed: bool) -> None:
    x = field(record, "input")
    x = x.T.contiguous() if transposed else x
    assert_equal(through(CPU, x, **options(record, transposed=transposed)), record, "_t" if transposed else "")


@pytest.mark.parametrize(("kind", "dtype", "scale"), product(KINDS, DTYPES[:2], SCALES), ids=str)
def test_awkward_tensors(kind: str, dtype: torch.dtype, scale: float) -> None:
    seed = KINDS.index(kind)
    for shape, sizes in (((64, 144), (64,)), ((96, 80), (5, 0, 75, 16)), ((48, 16), (16, 32)), ((16, 40), (16,))):
        assert_equals_reference(CPU, tensor(kind, shape, scale, dtype, seed), Rows(sizes))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 30),
    rows=st.integers(1, 40),
    features=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    option=st.sampled_from(["plain", "stochastic", "2d", "hadamard", "4over6_mae", "4over6_mse", "row_scaled", "amax"]),
)
def test_quantize_is_the_reference(kind: str, dtype: torch.dtype, exponent: int, rows: int, features: int, seed: int, option: str) -> None:
    shape = (rows, 2 * features)
    how: dict[str, object] = {}
    if option in ("2d", "hadamard"):
        # Small operands of a GEMM may be summed in another order where products are denormal.
        shape = (16 * rows, 16 * features)
        how = {"scaling": "2d"} if option == "2d" else {"hadamard": True}
        kind = "normal" if kind == "denormal" and option == "hadamard" else kind
    x = tensor(kind, shape, 10.0**exponent, dtype, seed)
    if option == "stochastic":
        how = {"random_bits": torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))}
    elif option.startswith("4over6"):
        how = {"clipping": option, "e4m3_bound": 256 if seed % 2 else 448}
    elif option == "row_scaled":
        how = {"row_scaled": True}
    elif option == "amax":
        how = {"amax": x.abs().max().float() * 3}
    ours, reference = through(CPU, x, **how), quantize(x, **how)  # type: ignore[arg-type]
    assert torch.equal(ours.scales, reference.scales)
    assert torch.equal(ours.codes, reference.codes)
    assert torch.equal(ours.amax, reference.amax)


def test_a_nan_is_never_lost() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = tensor("normal", (32, 64), 1.0, torch.float32, 0)
        x[17, 5] = bad
        rows = Rows((32,))
        for encoding in (Encoding("columns"), Encoding("columns", rotation=FIXED), Encoding("rows", rotation=FIXED)):
            amax = CPU.amax(x, rows, encoding)
            assert not amax.isfinite().all()
            products = CPU.quantize(x, amax, rows, encoding)
            assert isinstance(products, torch.Tensor)
            assert not (products * amax).isfinite().all()


@pytest.mark.parametrize(("features", "outputs"), [(16, 3), (100, 257), (512, 300)])
def test_a_row_is_multiplied_as_if_it_were_alone(features: int, outputs: int) -> None:
    sizes = (2, 0, 5, 1)
    x, weight = torch.randn(8, features), torch.randn(len(sizes) * outputs, features)
    before = torch.get_num_threads()
    try:
        results = []
        for backend, threads in ((CPU, 1), (CPU, 3), (Reference(), 1)):
            torch.set_num_threads(threads)
            results.append(torch.full((8, outputs), torch.nan))
            backend.multiply_rows(x, weight, sizes, results[-1])
    finally:
        torch.set_num_threads(before)
    group = [0, 0, 2, 2, 2, 2, 2, 3]
    exact = torch.stack([weight.double().view(len(sizes), outputs, features)[g] @ row for g, row in zip(group, x.double(), strict=True)])
    for found in results:
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * features)
    assert torch.equal(results[0], results[1])
    for row, g in enumerate(group):
        alone = torch.empty(1, outputs)
        CPU.multiply_rows(x[row : row + 1], weight[g * outputs : (g + 1) * outputs], (1,), alone)
        assert torch.equal(alone[0], results[0][row])


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    x, rows = tensor("heavy", (512, 1024), 1.0, torch.bfloat16, 1), Rows((100, 412))
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            encoding = Encoding("columns", rotation=FIXED)
            amax = CPU.amax(x, rows, encoding)
            packed = CPU.quantize(x, amax, rows, encoding, packed=True)
            assert isinstance(packed, Packed)
            results.append((amax, packed.codes, packed.scales))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_packed_operands_take_four_and_a_half_bits_an_element() -> None:
    x, rows = tensor("normal", (256, 128), 1.0, torch.float32, 1), Rows((256,))
    for encoding in (Encoding("rows"), Encoding("columns")):
        packed = CPU.quantize(x, CPU.amax(x, rows, encoding), rows, encoding, packed=True)
        assert isinstance(packed, Packed)
        assert 8 * packed.nbytes == 4.5 * x.numel()


def test_the_kernels_import_late_and_start_within_three_seconds() -> None:
    through(CPU, torch.randn(32, 32))  # compiled and on disk from here on
    program = (
        "import sys, time, torch; from model.precision.certify.matrix import quantize; from model.precision.backends.cpu import FusedCPU; "
        "assert 'numba' not in sys.modules; t = time.perf_counter(); quantize(FusedCPU(), torch.randn(32, 32)); print(time.perf_counter() - t)"
    )
    seconds = [float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    assert min(seconds) < 3, seconds
