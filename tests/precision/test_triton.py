"""The Triton kernels equal the reference bit for bit: in Triton's interpreter on any machine, and compiled on a GPU (-m gpu).

Triton decides when it is first imported whether to interpret, so interpreted checks run in a process of their own.
"""

import importlib.util
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.precision import nvfp4, philox
from model.precision.backends import triton as triton_backend
from model.precision.certify.matrix import quantize as through
from model.precision.hadamard import FIXED
from model.precision.nvfp4 import Quantized, quantize
from model.precision.operand import Encoding, Packed, Rows
from tests.precision.operands import REFERENCE, assert_same, operations, stream, tensor
from tests.precision.test_vectors import QUANTIZED, RECORDS, assert_equal, field, options

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
compiles = pytest.mark.skipif(not INSTALLED or INTERPRETING, reason="needs Triton's compiler")

KINDS = ["normal", "heavy", "outlier", "zeros", "ties", "denormal", "tiny_block"]
WITHOUT_ERROR = [name for name in QUANTIZED if not RECORDS[name].get("error")]
Run = Callable[..., None]


# -- what is checked, on a device ----------------------------------------------------------------------------------------------------------


def to(value: Any, device: str) -> Any:
    if isinstance(value, Packed):
        return Packed(value.along, value.codes.to(device), value.scales.to(device), value.features)
    if isinstance(value, Quantized):
        return Quantized(value.codes.to(device), value.scales.to(device), value.amax.to(device), value.bound)
    # A GPU's products are bf16: the same values.
    return value.to(device).float()


def check_record(device: str, record: str, transposed: bool) -> None:
    x = field(record, "input")
    x = x.T.contiguous() if transposed else x
    ours = through(triton_backend.Triton(), x.to(device), **options(record, transposed=transposed))
    assert_equal(to(ours, "cpu"), record, "_t" if transposed else "")


def check_operand(device: str, x: torch.Tensor, sizes: tuple[int, ...]) -> None:
    """Against the reference on the CPU: what its GEMM does there is the definition of the rotation."""
    backend, rows = triton_backend.Triton(), Rows(sizes)
    for (what, compute), (_, reference) in zip(operations(backend, x.to(device), rows), operations(REFERENCE, x, rows), strict=True):
        ours, theirs = compute(), reference()
        assert_same(to(ours, "cpu"), theirs, what)
        if isinstance(theirs, Packed):
            for dtype in (torch.float32, torch.bfloat16):
                unpacked = backend.unpack(to(theirs, device), dtype)
                assert_same(unpacked, REFERENCE.unpack(theirs, dtype), f"{what}, unpacked")


def check_wide(device: str) -> None:
    """More than one tile of columns, and of what one program of amax goes through."""
    backend, x, rows = triton_backend.Triton(), tensor("heavy", (20, 1100), 1.0, torch.bfloat16, 0), Rows((3, 17))
    x[18, 1099] = 1e6
    on_device = x.to(device)
    for encoding in (Encoding("columns"), Encoding("columns", rotation=FIXED), Encoding("rows")):
        amax = REFERENCE.amax(x, rows, encoding)
        assert_same(to(backend.amax(on_device, rows, encoding), "cpu"), amax, "amax")
        for packed in (False, True):
            drawn, here = (replace(encoding, stream=stream(20, device=where)) for where in ("cpu", device))
            ours = backend.quantize(on_device, amax.to(device), rows, here, packed=packed)
            assert_same(to(ours, "cpu"), REFERENCE.quantize(x, amax, rows, drawn, packed=packed), encoding.along)
        kept = REFERENCE.quantize(x, amax, rows, encoding, packed=True)
        assert isinstance(kept, Packed)
        assert_same(to(backend.unpack(to(kept, device), torch.float32), "cpu"), REFERENCE.unpack(kept, torch.float32), "unpacked")


def check_quantize(device: str, dtype: torch.dtype) -> None:
    backend = triton_backend.Triton()
    cases: tuple[tuple[tuple[int, int], dict[str, Any]], ...] = (
        ((5, 38), {}),
        ((1, 2), {}),
        ((7, 34), {"row_scaled": True}),
        ((9, 46), {"random": True}),
        ((32, 48), {"scaling": "2d"}),
        ((32, 48), {"scaling": "2d", "clipping": "4over6_mse", "e4m3_bound": 256}),
        ((5, 22), {"clipping": "4over6_mae", "e4m3_bound": 256}),
        ((5, 22), {"clipping": "4over6_mse", "row_scaled": True}),
        ((5, 48), {"hadamard": True}),
        ((6, 32), {"hadamard": True, "hadamard_signs": False, "random": True}),
        ((4, 32), {"amax": torch.tensor(9.0)}),
        ((4, 32), {"hadamard": True, "amax": torch.tensor(9.0)}),
    )
    for seed, (shape, how) in enumerate(cases):
        given = dict(how)
        x = tensor("heavy", shape, 1.0, dtype, seed)
        if given.pop("random", False):
            given["random_bits"] = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        # Not contiguous: quantise takes any matrix.
        ours, theirs = to(through(backend, x.T.contiguous().T.to(device), **moved), "cpu"), quantize(x, **given)
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scales), how
        assert torch.equal(ours.amax, theirs.amax) and ours.amax.shape == theirs.amax.shape and ours.bound == theirs.bound, how


def check_every_random_byte(device: str) -> None:
    magnitude = torch.linspace(0, 6, 41).repeat(8)
    x = torch.cat((magnitude, -magnitude))[:, None].expand(-1, 256).contiguous()
    bits = torch.arange(256, dtype=torch.uint8).expand(len(x), 256).contiguous()
    ours = to(through(triton_backend.Triton(), x.to(device), random_bits=bits.to(device)), "cpu")
    assert torch.equal(ours.codes, quantize(x, random_bits=bits).codes)


def check_nothing_finite_hides(device: str) -> None:
    backend, rows = triton_backend.Triton(), Rows((32,))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.bfloat16):
            x = tensor("normal", (32, 64), 1.0, dtype, 0).to(device)
            x[17, 5] = bad
            for encoding in (
                Encoding("columns"),
                Encoding("columns", rotation=FIXED),
                Encoding("rows"),
                Encoding("rows", rotation=FIXED),
                Encoding("rows", stream(32, device=device)),
                Encoding("rows", clipping="4over6_mse"),
                Encoding("tiles"),
            ):
                amax = backend.amax(x, rows, encoding)
                assert not amax.isfinite().all()
                products = backend.quantize(x, amax, rows, encoding)
                assert isinstance(products, torch.Tensor) and not (products * amax).isfinite().all(), encoding
                packed = backend.quantize(x, amax, rows, encoding, packed=True)
                assert isinstance(packed, Packed)
                assert not (backend.unpack(packed, torch.float32) * amax).isfinite().all(), encoding
    # A NaN stays one where the amax is that of other rows.
    x = tensor("normal", (32, 64), 1.0, torch.float32, 0).to(device)
    amax = backend.amax(x, rows, Encoding("rows"))
    x[17, 5] = torch.nan
    for encoding in (Encoding("rows"), Encoding("columns")):
        products = backend.quantize(x, amax, rows, encoding)
        assert isinstance(products, torch.Tensor) and products[17, 5].isnan() and products[:16].isfinite().all()


def check_empty(device: str) -> None:
    backend = triton_backend.Triton()
    for rows in (Rows((0,)), Rows((0, 0))):
        x = torch.zeros(0, 32, device=device)
        for encoding in (Encoding("rows"), Encoding("columns", rotation=FIXED)):
            amax = backend.amax(x, rows, encoding)
            assert amax.tolist() == [0.0] * len(rows.sizes)
            products = backend.quantize(x, amax, rows, encoding)
            assert isinstance(products, torch.Tensor) and products.shape == (0, 32)


def check_bytes_are_drawn_in_the_kernel(device: str) -> None:
    backend, x, rows = triton_backend.Triton(), tensor("normal", (16, 64), 1.0, torch.float32, 0), Rows((16,))
    runs = ((96, 16), (32, 48))
    expected = REFERENCE.quantize(x, x.abs().max()[None], rows, Encoding("rows", stream(16, runs=runs)))

    def none(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("random bytes were stored")

    original, philox.random_bytes = philox.random_bytes, none
    try:
        x = x.to(device)
        ours = backend.quantize(x, x.abs().max()[None], rows, Encoding("rows", stream(16, runs=runs, device=device)))
    finally:
        philox.random_bytes = original
    assert_same(to(ours, "cpu"), expected, "rows")


# -- interpreted ---------------------------------------------------------------------------------------------------------------------------


def _prepare() -> None:
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    from triton.runtime import interpreter

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    # A GPU rounds tl.fma once; up to 3.7 the interpreter rounds the product too, which loses bits of denormals.
    interpreter.InterpreterBuilder.create_fma = fused


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """`interpreted(check, *args)` calls `check("cpu", *args)` where Triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)
        pool.submit(os.getpid).result()  # started, with this environment
    with pool:
        yield lambda check, *arguments: pool.submit(check, "cpu", *arguments).result()


@needs_triton
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("record", WITHOUT_ERROR)
def test_the_vectors_of_transformer_engine(interpreted: Run, record: str, transposed: bool) -> None:
    interpreted(check_record, record, transposed)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_tensors(interpreted: Run, kind: str, dtype: torch.dtype) -> None:
    scale = 1e-6 if kind in ("heavy", "zeros") else 1.0
    interpreted(check_operand, tensor(kind, (16, 40), scale, dtype, KINDS.index(kind)), (16,))


@needs_triton
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.bfloat16, (5, 0, 22)), (torch.float16, (16, 0, 16))], ids=str)
def test_groups(interpreted: Run, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    interpreted(check_operand, tensor("normal", (sum(sizes), 64), 1.0, dtype, 0), sizes)


@needs_triton
def test_several_tiles_of_columns(interpreted: Run) -> None:
    interpreted(check_wide)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize(interpreted: Run, dtype: torch.dtype) -> None:
    interpreted(check_quantize, dtype)


@needs_triton
def test_every_random_byte(interpreted: Run) -> None:
    interpreted(check_every_random_byte)


@needs_triton
def test_nan_and_infinity_are_never_lost(interpreted: Run) -> None:
    interpreted(check_nothing_finite_hides)


@needs_triton
def test_no_rows(interpreted: Run) -> None:
    interpreted(check_empty)


@needs_triton
def test_random_bytes_are_not_stored(interpreted: Run) -> None:
    interpreted(check_bytes_are_drawn_in_the_kernel)


# -- without running a kernel --------------------------------------------------------------------------------------------------------------


@needs_triton
def test_undefined_combinations_are_refused() -> None:
    backend = triton_backend.Triton()
    for shape, how, what in (
        ((4, 5), {}, "even number"),
        ((8, 32), {"scaling": "2d"}, "multiples of 16"),
        ((8, 32), {"clipping": "4over6_mae", "hadamard": True}, "forward operands"),
        ((8, 32), {"row_scaled": True, "hadamard": True}, "forward activations"),
        ((8, 24), {"hadamard": True}, "groups of 16"),
    ):
        for function in (partial(through, backend), nvfp4.quantize):
            with pytest.raises(ValueError, match=what):
                function(torch.zeros(shape), **how)  # type: ignore[operator]
    with pytest.raises(ValueError, match="whole tiles"):
        backend.quantize(torch.zeros(32, 16), torch.zeros(2), Rows((8, 24)), Encoding("tiles"))


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_backend.Triton.missing(cuda) == "the triton package is not installed: pip install triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_backend.Triton.missing(cpu) == "it needs a CUDA GPU and this run is on cpu"
    for capability, lacking in (((7, 5), True), ((8, 0), False), ((9, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        said = triton_backend.Triton.missing(cuda)
        assert (said is not None and "8.0" in said and "7.5" in said) if lacking else said is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.Triton.missing(cpu) is None


TYPES = {"x": "*bf16", "amax": "*fp32", "result": "*bf16", "feature_blocks": "*i32", "sample": "*i64", "position": "*i64"} | dict.fromkeys(
    ("key0", "key1", "step", "rotation", "rows", "features"), "i32"
)
FLAGS = {"GROUPED": False, "ROW_SCALED": False, "RANDOM": 2, "EXPERT": False, "CLIPPING": 0, "TOP": 2688.0, "TILES": False, "PACKED": False}
FLAGS |= {"ROTATE": 0, "COLUMNS": False, "WIDTH": 32}
PACKED = {"result": "*u8", "scales": "*u8"}
GROUPED = {"block_map": "*i32", "expert": "*i64"}
# What is compiled, with the widths and warps of a launch; every kernel, and every flag once.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, str], int]] = {
    "rows": ("rows_kernel", {}, {}, 1),
    "columns": ("columns_kernel", {"ROTATE": 1}, {}, 1),
    "rows, packed, routed": ("rows_kernel", {"GROUPED": True, "EXPERT": True, "PACKED": True, "WIDTH": 256}, PACKED | GROUPED, 4),
    "rows, rotated": ("rows_kernel", {"ROTATE": 2, "WIDTH": 256}, {}, 4),
    "rows, row-scaled": ("rows_kernel", {"ROW_SCALED": True, "RANDOM": 0, "WIDTH": 256}, {}, 4),
    "tiles, packed, 4over6": (
        "rows_kernel",
        {"RANDOM": 0, "TILES": True, "PACKED": True, "CLIPPING": 1, "TOP": 1536.0, "WIDTH": 256},
        PACKED,
        4,
    ),
    "columns, packed, routed": (
        "columns_kernel",
        {"GROUPED": True, "EXPERT": True, "PACKED": True, "ROTATE": 1, "WIDTH": 128},
        PACKED | GROUPED,
        1,
    ),
    "columns, given bits, 4over6": (*("columns_kernel", {"RANDOM": 1, "CLIPPING": 2, "TOP": 1536.0, "WIDTH": 128}, {"bits": "*u8"}, 1),),
    "amax": ("amax_kernel", {"TILES": 4, "WIDTH": 256}, {"result": "*i32"}, 4),
    "amax, rotated, routed": (
        "amax_kernel",
        {"GROUPED": True, "ROTATE": 1, "TILES": 4, "WIDTH": 128},
        {"result": "*i32", "block_map": "*i32"},
        1,
    ),
    "unpack rows": ("unpack_kernel", {"WIDTH": 256}, {"codes": "*u8", "scales": "*u8"}, 4),
    "unpack columns": ("unpack_kernel", {"COLUMNS": True, "WIDTH": 128}, {"codes": "*u8", "scales": "*u8"}, 1),
}


@compiles
@pytest.mark.parametrize(
    ("variant", "capability"),
    [
        *((variant, 90) if variant in ("rows", "columns") else pytest.param(variant, 90, marks=pytest.mark.slow) for variant in VARIANTS),
        *(pytest.param(variant, capability, marks=pytest.mark.slow) for variant in ("rows", "columns") for capability in (80, 100)),
    ],
)
def test_compiled_kernels_round_as_written(variant: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler, which needs no GPU, neither fuses nor approximates; the rotation's fused multiply-adds are those of the source."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.precision.backends import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, changed, pointers, warps = VARIANTS[variant]
    kernel, flags, types = getattr(triton_kernels, name), FLAGS | changed, TYPES | pointers
    constants = {(i,): flags.get(argument) for i, argument in enumerate(kernel.arg_names) if argument not in types}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    assert not re.search(r"div\.(full|approx)|rcp|(add|mul|sub|fma|div)\.\w+\.ftz", ptx)
    assert ("div.rn.f32" in ptx) == (name in ("rows_kernel", "columns_kernel"))
    assert bool(re.search(r"\bfma\.rn\.f32", ptx)) == bool(flags["ROTATE"])


# -- compiled, on a GPU --------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@compiles
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestOnAGPU:
    @pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
    def test_the_vectors_of_transformer_engine(self, transposed: bool) -> None:
        for record in WITHOUT_ERROR:
            check_record("cuda", record, transposed)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_awkward_tensors(self, kind: str, dtype: torch.dtype) -> None:
        for scale in (1.0, 1e-6) if dtype == torch.float16 else (1.0, 1e-30, 1e-6, 1e30):
            for shape, sizes in (((64, 144), (64,)), ((96, 80), (5, 0, 75, 16)), ((48, 16), (16, 32)), ((16, 40), (16,))):
                check_operand("cuda", tensor(kind, shape, scale, dtype, KINDS.index(kind)), sizes)

    @pytest.mark.parametrize("sizes", [(1024,), (256, 0, 512, 256), (3, 700, 0, 321)], ids=str)
    def test_large_operands(self, sizes: tuple[int, ...]) -> None:
        check_operand("cuda", tensor("normal", (1024, 1360), 1.0, torch.bfloat16, 0), sizes)
        check_wide("cuda")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_quantize(self, dtype: torch.dtype) -> None:
        check_quantize("cuda", dtype)

    def test_every_random_byte(self) -> None:
        check_every_random_byte("cuda")

    def test_corners(self) -> None:
        check_nothing_finite_hides("cuda")
        check_empty("cuda")
        check_bytes_are_drawn_in_the_kernel("cuda")
