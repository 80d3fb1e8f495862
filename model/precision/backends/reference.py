"""The reference backend: the operations of `model.precision.nvfp4` on grouped operands, in plain PyTorch."""

import torch
from torch import Tensor

from model.precision import hadamard as rht
from model.precision import nvfp4
from model.precision.backend import Packed, Rows, gemm_dtype, pad_rows, per_row, rounded_to_bf16
from model.precision.nvfp4 import BLOCK, Clipping, Encoded
from model.precision.philox import Stream


def _pad_features(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))


def _in_blocks(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, BLOCK))


class Reference:
    """See `model.precision.backend.Backend`."""

    name = "reference"
    quantize = staticmethod(nvfp4.quantize)
    bf16 = staticmethod(rounded_to_bf16)

    def amax(self, x: Tensor, rows: Rows, *, hadamard: bool = False) -> Tensor:
        if hadamard:
            x, rows = rht.rotate(pad_rows(x, rows).T).T, rows.padded(BLOCK)
        largest = x.abs().amax(-1).float()
        if len(rows.sizes) == 1:
            return largest.amax(0, keepdim=True) if len(largest) else largest.new_zeros(1)
        return torch.segment_reduce(largest, "max", lengths=torch.tensor(rows.sizes, device=x.device), initial=0.0)

    def quantize_rows(
        self,
        x: Tensor,
        amax: Tensor,
        rows: Rows,
        *,
        stream: Stream | None = None,
        clipping: Clipping = "saturate",
        bound: float = 448.0,
        tiles: bool = False,
        packed: bool = False,
    ) -> Tensor | Packed:
        features = x.shape[1]
        padded = _pad_features(x.float())
        blocks = _in_blocks(padded)
        bits = None if stream is None else _in_blocks(_pad_features(stream.bytes(features)))
        block_amax = nvfp4.tile_amax(padded) if tiles else blocks.abs().amax(-1)
        if amax.dim() == 1:
            amax = per_row(amax, rows)
        encoded = nvfp4.encode(blocks, block_amax, amax, random_bits=bits, clipping=clipping, bound=bound, tile=tiles)
        if not packed:
            return encoded.products()[:, :features].to(gemm_dtype(x))
        codes, scales = _packed(encoded, blocks)
        return Packed("tiles" if tiles else "rows", codes, scales[::BLOCK].contiguous() if tiles else scales, features)

    def quantize_columns(
        self,
        x: Tensor,
        amax: Tensor,
        rows: Rows,
        *,
        hadamard: bool = False,
        stream: Stream | None = None,
        clipping: Clipping = "saturate",
        bound: float = 448.0,
        packed: bool = False,
    ) -> Tensor | Packed:
        columns = pad_rows(x, rows).T
        if hadamard:
            columns = rht.rotate(columns)
        blocks = _in_blocks(columns.float())
        bits = None if stream is None else _in_blocks(pad_rows(stream.bytes(x.shape[1]), rows).T)
        of_block = per_row(amax, Rows(tuple(size // BLOCK for size in rows.padded(BLOCK).sizes))).T
        encoded = nvfp4.encode(blocks, blocks.abs().amax(-1), of_block, random_bits=bits, clipping=clipping, bound=bound)
        if not packed:
            return encoded.products().T.contiguous().to(gemm_dtype(x))
        codes, scales = _packed(encoded, blocks)
        return Packed("columns", codes.T.contiguous(), scales.T.contiguous(), x.shape[1])

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        columns = packed.along == "columns"
        codes, scales = (packed.codes.T, packed.scales.T) if columns else (packed.codes, packed.scales)
        scale = scales.contiguous().view(torch.float8_e4m3fn).float().repeat_interleave(BLOCK, dim=1)
        if packed.along == "tiles":
            scale = scale.repeat_interleave(BLOCK, dim=0)
        products = (nvfp4.decode(codes) * scale).to(dtype)
        return products.T.contiguous() if columns else products[:, : packed.features]


def _packed(encoded: Encoded, blocks: Tensor) -> tuple[Tensor, Tensor]:
    return nvfp4.pack(encoded.code.flatten(1), (blocks < 0).flatten(1)), nvfp4.scale_bytes(encoded.scale)
