"""NVFP4 quantisation as fused Triton kernels: any NVIDIA GPU since Ampere, the values of `model.precision.nvfp4` bit for bit.

FP4 tensor cores exist on Blackwell only, but the numbers can be had everywhere: products code * scale have at most six significant bits, so
a bf16 GEMM of them, accumulated in fp32, is the NVFP4 GEMM. What is left is to prepare the products fast. In PyTorch that takes some thirty
passes over memory; here it takes two, the least possible, because the scale of every block depends on the amax of the whole operand:

    amax       reads x once; one atomic maximum a program, so the result does not depend on their order
    quantise   reads x once and writes 2 bytes an element (products), or 9/16 (packed); rotation, random bytes, scales, rounding and packing
               happen in registers

Groups of rows (routed experts) are not padded by copying: every program looks up in a small table which 16 rows it works on, how many of
them exist and whose amax holds. Random bytes are drawn in the kernel from the coordinates of each element, without storing any; where a
shard of features does not begin or end at a multiple of 16, they come from `Stream.bytes` as a tensor instead.

Trade-off: the rotation runs as 16 fused multiply-adds an element on ordinary cores. Tensor cores would be faster and give other last bits;
equal bits let a GPU run be checked against, or continued from, a CPU run.

With TRITON_INTERPRET=1 in the environment (before Triton is first imported) the kernels run on a CPU, slowly, for tests.
Source of the numerics: see `model.precision.nvfp4`. The kernels: `model.precision.backends.triton_kernels`.
"""

import contextlib
import importlib.util
import os
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.precision.backend import Backend
from model.precision.nvfp4 import BLOCK, MAX_CODE
from model.precision.operand import Encoding, Packed, Rows, gemm_dtype, row_amax
from model.precision.philox import FEATURES_PER_CALL, WORD, Draws, Stream
from model.precision.transfer import to_device

ROWS_WIDTH = 256  # columns of a tile with blocks along rows, for four warps
COLUMNS_WIDTH = 128  # with blocks along columns, for one warp: all 16 rows of a column are in one thread, nothing crosses threads
AMAX_TILES = 4  # tiles of columns of a program: fewer atomics


@lru_cache(maxsize=64)
def _block_map(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [3, blocks]: first row, number of rows and group of every block of 16 rows."""
    size = np.array(sizes, dtype=np.int64)
    blocks = -(-size // BLOCK)
    group = np.repeat(np.arange(len(size)), blocks)
    within = (np.arange(len(group)) - (blocks.cumsum() - blocks)[group]) * BLOCK
    first = (size.cumsum() - size)[group] + within
    return _table(np.stack((first, np.minimum(size[group] - within, BLOCK), group)), device)


@lru_cache(maxsize=256)
def _feature_blocks(runs: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32: global feature // 16 of every 16 local features, of runs of whole blocks."""
    return _table(
        np.concatenate([np.arange(first, first + count, FEATURES_PER_CALL) // FEATURES_PER_CALL for first, count in runs]), device
    )


def _table(values: np.ndarray, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(values.astype(np.int32)), device)


def _signed(word: int) -> int:
    """A 32-bit word as Triton passes an int32, so that every key gives the same kernel."""
    word &= WORD
    return word - (1 << 32) if word >> 31 else word


class Triton(Backend):
    """See `model.precision.backend.Backend`."""

    name = "triton"

    def __init__(self) -> None:
        # Here and not above: Triton is there on machines with a GPU only.
        from model.precision.backends import triton_kernels

        self._kernels = triton_kernels
        self._clipping = {"saturate": triton_kernels.SATURATE, "4over6_mae": triton_kernels.MAE, "4over6_mse": triton_kernels.MSE}

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed: pip install triton"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if device.type != "cuda":
            return f"it needs a CUDA GPU and this run is on {device.type}"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs a GPU of compute capability 8.0 (Ampere) or above, and this one has {major}.{minor}"
        return None

    def amax(self, x: Tensor, rows: Rows, encoding: Encoding) -> Tensor:
        if encoding.row_scaled:
            return row_amax(x)
        x = x.contiguous()
        result = torch.zeros(len(rows.sizes), dtype=torch.int32, device=x.device)
        block_map, blocks = self._blocks(x, rows)
        rotation, flag = self._rotation(encoding)
        self.launch(
            self._kernels.amax_kernel,
            x,
            (x, block_map, rotation, result, *x.shape),
            blocks=blocks,
            width=COLUMNS_WIDTH if flag == self._kernels.DOWN.value else ROWS_WIDTH,
            tiles=AMAX_TILES,
            GROUPED=block_map is not None,
            ROTATE=flag,
            TILES=AMAX_TILES,
        )
        return result.view(torch.float32)

    def quantize(self, x: Tensor, amax: Tensor, rows: Rows, encoding: Encoding, *, packed: bool = False) -> Tensor | Packed:
        return (self._columns if encoding.along == "columns" else self._rows)(x.contiguous(), amax.contiguous(), rows, encoding, packed)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        columns = packed.along == "columns"
        rows = len(packed.codes) * 2 if columns else len(packed.codes)
        result = torch.empty(rows, packed.features, dtype=dtype, device=packed.codes.device)
        self.launch(
            self._kernels.unpack_kernel,
            result,
            (packed.codes.contiguous(), packed.scales.contiguous(), result, rows, packed.features),
            blocks=-(-rows // BLOCK),
            width=COLUMNS_WIDTH if columns else ROWS_WIDTH,
            COLUMNS=columns,
            TILES=packed.along == "tiles",
        )
        return result

    # -- arguments of the kernels ----------------------------------------------------------------------------------------------------------

    def _rows(self, x: Tensor, amax: Tensor, rows: Rows, encoding: Encoding, packed: bool) -> Tensor | Packed:
        tiles, features = encoding.along == "tiles", x.shape[1]
        if tiles and rows.padded(BLOCK) != rows:
            raise ValueError(f"16 x 16 tiles need groups of whole tiles, not of {list(rows.sizes)} rows")
        wide = -(-features // BLOCK)
        scales = None
        if packed:
            result = torch.empty(len(x), wide * BLOCK // 2, dtype=torch.uint8, device=x.device)
            scales = torch.empty(len(x) // BLOCK if tiles else len(x), wide, dtype=torch.uint8, device=x.device)
        else:
            result = torch.empty(len(x), features, dtype=gemm_dtype(x.device), device=x.device)
        block_map, blocks = self._blocks(x, rows)
        random, flags = self._random(x, encoding.stream)
        rotation, rotate = self._rotation(encoding)
        self.launch(
            self._kernels.rows_kernel,
            x,
            (x, amax, block_map, *random, rotation, result, scales, *x.shape),
            blocks=blocks,
            width=ROWS_WIDTH,
            GROUPED=block_map is not None,
            ROW_SCALED=encoding.row_scaled,
            **flags,
            CLIPPING=self._clipping[encoding.clipping].value,
            TOP=MAX_CODE * encoding.bound,
            ROTATE=rotate,
            TILES=tiles,
            PACKED=packed,
        )
        return result if scales is None else Packed(encoding.along, result, scales, features)

    def _columns(self, x: Tensor, amax: Tensor, rows: Rows, encoding: Encoding, packed: bool) -> Tensor | Packed:
        features = x.shape[1]
        block_map, blocks = self._blocks(x, rows)
        scales = None
        if packed:
            result = torch.empty(blocks * BLOCK // 2, features, dtype=torch.uint8, device=x.device)
            scales = torch.empty(blocks, features, dtype=torch.uint8, device=x.device)
        else:
            result = torch.empty(blocks * BLOCK, features, dtype=gemm_dtype(x.device), device=x.device)
        random, flags = self._random(x, encoding.stream)
        rotation, rotate = self._rotation(encoding)
        self.launch(
            self._kernels.columns_kernel,
            x,
            (x, amax, block_map, *random, rotation, result, scales, *x.shape),
            blocks=blocks,
            width=COLUMNS_WIDTH,
            GROUPED=block_map is not None,
            **flags,
            CLIPPING=self._clipping[encoding.clipping].value,
            TOP=MAX_CODE * encoding.bound,
            ROTATE=rotate,
            PACKED=packed,
        )
        return result if scales is None else Packed("columns", result, scales, features)

    def _rotation(self, encoding: Encoding) -> tuple[int, int]:
        """The kernels' arguments `rotation`, bit k set where sign k is negative, and ROTATE: which way."""
        if encoding.rotation is None:
            return 0, self._kernels.NOT.value
        signs = sum(1 << k for k, sign in enumerate(encoding.rotation.signs) if sign < 0)
        return signs, (self._kernels.DOWN if encoding.along == "columns" else self._kernels.ACROSS).value

    @staticmethod
    def _blocks(x: Tensor, rows: Rows) -> tuple[Tensor | None, int]:
        """The table of blocks of 16 rows (None: one group, arithmetic does), and their number."""
        if len(rows.sizes) == 1:
            return None, -(-len(x) // BLOCK)
        block_map = _block_map(rows.sizes, x.device)
        return block_map, block_map.shape[1]

    def _random(self, x: Tensor, stream: Draws | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The kernels' arguments from `bits` to `step`, and their flags."""
        kernels, features = self._kernels, x.shape[1]
        if stream is None:
            return (*(None,) * 5, 0, 0, 0), {"RANDOM": kernels.NEAREST.value, "EXPERT": False}
        if isinstance(stream, Stream) and (runs := stream.whole_calls(features)) is not None:
            arrays = (stream.sample.contiguous(), stream.position.contiguous())
            expert = None if stream.expert is None else stream.expert.contiguous()
            words = (_signed(stream.key[0]), _signed(stream.key[1]), _signed(stream.step))
            arguments = (None, *arrays, expert, _feature_blocks(runs, x.device), *words)
            return arguments, {"RANDOM": kernels.PHILOX.value, "EXPERT": expert is not None}
        return (stream.bytes(features).contiguous(), *(None,) * 4, 0, 0, 0), {"RANDOM": kernels.GIVEN.value, "EXPERT": False}

    @staticmethod
    def launch(kernel: Any, x: Tensor, arguments: tuple[Any, ...], *, blocks: int, width: int, tiles: int = 1, **flags: Any) -> None:
        """One program for every block of 16 rows and `tiles` tiles of columns."""
        features = arguments[-1]
        warps = width // 64 if width == ROWS_WIDTH else 1
        width = min(width, max(BLOCK, 1 << (features - 1).bit_length()))
        grid = (blocks, -(-features // (width * tiles)))
        if 0 in grid:
            return
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            kernel[grid](*arguments, **flags, WIDTH=width, num_warps=warps, enable_fp_fusion=False)
