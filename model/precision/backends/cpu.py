"""The CPU backend: NVFP4 by the kernels of `model.precision.backends.cpu_kernels`, over the threads PyTorch is allowed.

python -m model.precision.backends        compiles every kernel once and keeps it on disk
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.precision.backend import Backend
from model.precision.hadamard import FIXED
from model.precision.nvfp4 import BLOCK
from model.precision.operand import Encoding, Packed, Rows, rounded_to_bf16, row_amax
from model.precision.philox import EXPERT_SHIFT, FEATURES_PER_CALL, WORD, Draws, Stream

Array = np.ndarray[Any, Any]
ROUNDING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as `cpu_kernels` counts them
SMALLEST_SHARE = 1 << 16  # elements: below that a second thread costs more than it brings
CLIPPING: dict[str, int] = {"saturate": 0, "4over6_mae": 1, "4over6_mse": 2}
NO_FLOATS, NO_BYTES = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint8)
NO_BLOCKS, NO_CODES = np.empty((0, 0, 0), np.float32), np.empty((0, 0, 0), np.uint8)

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _kernels() -> Any:
    # Numba takes most of a second to import: only who quantises pays it.
    from model.precision.backends import cpu_kernels

    return cpu_kernels


def _spread(work: Callable[[int, int], Any], units: int, elements: int) -> None:
    """work(first, last) over `units`, on as many threads as PyTorch may use; the kernels release the interpreter's lock."""
    global _pool, _pool_size
    threads = max(1, min(torch.get_num_threads(), units, elements // SMALLEST_SHARE))
    if threads == 1:
        work(0, units)
        return
    with _pool_lock:
        if _pool is None or _pool_size < threads - 1:
            _pool, _pool_size = ThreadPoolExecutor(threads - 1, thread_name_prefix="nvfp4"), threads - 1
        pool = _pool
    cuts = [units * i // threads for i in range(threads + 1)]
    others = [pool.submit(work, cuts[i], cuts[i + 1]) for i in range(1, threads)]
    work(0, cuts[1])
    for other in others:
        other.result()


def _array(x: Tensor) -> Array:
    """x [rows, features] as the kernels read it: fp32, or the bits of bf16; fp16 is widened."""
    x = x.detach()
    if x.dtype == torch.float16:
        x = x.float()
    x = x.contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _pad_features(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)) if x.shape[1] % BLOCK else x


def _in_blocks(a: Array) -> Array:
    """[rows, blocks, 16]"""
    return a.reshape(len(a), a.shape[1] // BLOCK, BLOCK)


def _largest(bits: Array) -> Tensor:
    return torch.from_numpy(bits).view(torch.float32)


def _groups(rows: Rows) -> Array:
    """The group of each row, int32."""
    if len(rows.sizes) == 1:
        return np.zeros(rows.sizes[0], np.int32)
    return np.repeat(np.arange(len(rows.sizes), dtype=np.int32), rows.sizes)


def _row_blocks(rows: Rows) -> tuple[Array, Array, Array]:
    """First row, number of rows and group of every block of 16 rows; int32."""
    starts = [np.arange(first, last, BLOCK, dtype=np.int32) for first, last in rows.bounds]
    counts = [np.minimum(last - start, BLOCK).astype(np.int32) for start, (_, last) in zip(starts, rows.bounds, strict=True)]
    groups = [np.full(len(start), group, np.int32) for group, start in enumerate(starts)]
    if len(starts) == 1:
        return starts[0], counts[0], groups[0]
    return np.concatenate(starts), np.concatenate(counts), np.concatenate(groups)


def _noise(stream: Draws | None, rows: int, features: int, *, in_blocks: bool = False) -> tuple[Any, ...]:
    """The kernels' arguments noise ... k1: see `cpu_kernels.quantize_columns`."""
    nothing, none = np.zeros(0, np.uint32), NO_CODES if in_blocks else NO_BYTES
    zero = np.uint64(0)
    if stream is None:
        return 0, none, nothing, nothing, nothing, nothing, zero, zero, zero
    if isinstance(stream, Stream) and (runs := stream.whole_calls(features)) is not None:
        first_blocks = [
            np.arange(first // FEATURES_PER_CALL, -(-(first + count) // FEATURES_PER_CALL), dtype=np.uint32) for first, count in runs
        ]
        expert = np.zeros(rows, np.uint32)
        if stream.expert is not None:
            expert = ((stream.expert.numpy() + 1) << EXPERT_SHIFT).astype(np.uint32)
        where = [(values.numpy() & WORD).astype(np.uint32) for values in (stream.position, stream.sample)]
        key = [np.uint64(word) for word in stream.key]
        return 2, none, np.concatenate(first_blocks), expert, *where, np.uint64(stream.step & WORD), *key
    bits = stream.bytes(features)
    drawn = _pad_features(bits).contiguous().numpy() if in_blocks else bits.contiguous().numpy()
    return 1, _in_blocks(drawn) if in_blocks else drawn, nothing, nothing, nothing, nothing, zero, zero, zero


def _factors(encoding: Encoding) -> Array:
    return encoding.rotation.matrix().numpy() if encoding.rotation is not None else NO_FLOATS


class FusedCPU(Backend):
    """See `model.precision.backend.Backend`."""

    name = "cpu"

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"it runs on CPUs, and this run is on {device.type}"

    def amax(self, x: Tensor, rows: Rows, encoding: Encoding) -> Tensor:
        if encoding.row_scaled:
            return row_amax(x)
        if encoding.along == "columns" and encoding.rotation is not None:
            return self._rotated_columns_amax(x, rows, _factors(encoding).T.copy())
        k, a, factors, rounding = _kernels(), _in_blocks(_array(_pad_features(x))), _factors(encoding), ROUNDING[x.dtype]
        of_row = np.empty(len(a), np.int32)
        _spread(lambda first, last: k.row_amax(a, first, last, factors, rounding, of_row), len(a), x.numel())
        return _largest(np.array([of_row[i:j].max(initial=0) for i, j in rows.bounds], np.int32))

    def _rotated_columns_amax(self, x: Tensor, rows: Rows, factors: Array) -> Tensor:
        k, a, groups = _kernels(), _array(x), len(rows.sizes)
        starts, counts, of_block = _row_blocks(rows)
        parts: list[Array] = []

        def rotated(first: int, last: int) -> None:
            largest = np.zeros(groups, np.int32)
            k.columns_amax(a, first, last, starts, counts, of_block, factors, ROUNDING[x.dtype], largest)
            parts.append(largest)

        _spread(rotated, len(starts), x.numel())
        return _largest(np.max(parts, axis=0))

    def quantize(self, x: Tensor, amax: Tensor, rows: Rows, encoding: Encoding, *, packed: bool = False) -> Tensor | Packed:
        return (self._columns if encoding.along == "columns" else self._rows)(x, amax, rows, encoding, packed)

    def _rows(self, x: Tensor, amax: Tensor, rows: Rows, encoding: Encoding, packed: bool) -> Tensor | Packed:
        k, features, tiles = _kernels(), x.shape[1], encoding.along == "tiles"
        a = _in_blocks(_array(_pad_features(x)))
        blocks = a.shape[1]
        products = NO_BLOCKS if packed else np.empty(a.shape, np.float32)
        codes = np.empty((len(a), blocks * BLOCK // 2), np.uint8) if packed else NO_BYTES
        scales = np.empty((len(a) // BLOCK if tiles else len(a), blocks), np.uint8) if packed else NO_BYTES
        how, b = CLIPPING[encoding.clipping], np.float32(encoding.bound)
        flat = amax.detach().numpy().reshape(-1)
        if tiles:
            groups = _groups(Rows(tuple(size // BLOCK for size in rows.sizes)))
            _spread(lambda i, j: k.quantize_tiles(a, i, j, groups, flat, b, how, packed, products, codes, scales), len(groups), x.numel())
        else:
            groups = np.arange(len(a), dtype=np.int32) if encoding.row_scaled else _groups(rows)
            noise, factors = _noise(encoding.stream, len(a), features, in_blocks=True), _factors(encoding)
            _spread(
                lambda i, j: k.quantize_rows(
                    a, i, j, groups, flat, b, factors, ROUNDING[x.dtype], how, *noise, packed, products, codes, scales
                ),
                len(a),
                x.numel(),
            )
        if packed:
            return Packed(encoding.along, torch.from_numpy(codes), torch.from_numpy(scales), features)
        return torch.from_numpy(products.reshape(len(a), -1))[:, :features]

    def _columns(self, x: Tensor, amax: Tensor, rows: Rows, encoding: Encoding, packed: bool) -> Tensor | Packed:
        k, a, features = _kernels(), _array(x), x.shape[1]
        starts, counts, groups = _row_blocks(rows)
        n = len(starts)
        products = NO_FLOATS if packed else np.empty((BLOCK * n, features), np.float32)
        codes = np.empty((BLOCK // 2 * n, features), np.uint8) if packed else NO_BYTES
        scales = np.empty((n, features), np.uint8) if packed else NO_BYTES
        noise = _noise(encoding.stream, len(a), features)
        flat, factors, rounding = amax.detach().numpy(), _factors(encoding).T.copy(), ROUNDING[x.dtype]
        how, b = CLIPPING[encoding.clipping], np.float32(encoding.bound)
        _spread(
            lambda i, j: k.quantize_columns(
                a, i, j, starts, counts, groups, flat, b, factors, rounding, how, *noise, packed, products, codes, scales
            ),
            n,
            x.numel(),
        )
        if packed:
            return Packed("columns", torch.from_numpy(codes), torch.from_numpy(scales), features)
        return torch.from_numpy(products)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        k, codes, scales = _kernels(), packed.codes.numpy(), packed.scales.numpy()
        if packed.along == "columns":
            products = np.empty((2 * len(codes), codes.shape[1]), np.float32)
            _spread(lambda i, j: k.unpack_columns(codes, scales, i, j, products), len(scales), products.size)
        else:
            products = np.empty((len(codes), 2 * codes.shape[1]), np.float32)
            per_scale = BLOCK if packed.along == "tiles" else 1
            _spread(lambda i, j: k.unpack_rows(codes, scales, per_scale, i, j, products), len(codes), products.size)
        return torch.from_numpy(products)[:, : packed.features].to(dtype)

    def bf16(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return rounded_to_bf16(x)
        k, source = _kernels(), x.detach().contiguous()
        result = torch.empty_like(source)
        values, rounded = source.view(-1).numpy(), result.view(-1).numpy()
        _spread(lambda first, last: k.round_to_bf16(values, first, last, rounded), len(values), len(values))
        return result

    def multiply_rows(self, x: Tensor, weight: Tensor, sizes: Sequence[int], into: Tensor) -> None:
        from model.precision.backends import cpu_rows

        left, right, result = (each.detach().contiguous().numpy() for each in (x.float(), weight.float(), into))
        starts = np.array([0, *accumulate(sizes)])
        _spread(
            lambda first, last: cpu_rows.multiply_rows(left, right, starts, first, last, result), into.shape[1], into.numel() * x.shape[1]
        )


def compile_all() -> None:
    """Runs every kernel once on every dtype, so that the compiled code lies on disk."""
    backend = FusedCPU()
    rows = Rows((BLOCK,))
    tokens = torch.arange(BLOCK)
    stream = Stream((1, 2), tokens, tokens, 0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(BLOCK, 2 * BLOCK).to(dtype)
        for encoding in (Encoding("tiles"), Encoding("rows", stream), Encoding("columns", stream, FIXED), Encoding("rows", rotation=FIXED)):
            amax = backend.amax(x, rows, encoding)
            backend.quantize(x, amax, rows, encoding)
            operand = backend.quantize(x, amax, rows, encoding, packed=True)
            assert isinstance(operand, Packed)
            backend.unpack(operand, torch.float32)
        backend.bf16(x)
    backend.multiply_rows(torch.randn(2, 16), torch.randn(3, 16), (2,), torch.empty(2, 3))
