"""The reference backend: the operations of `model.precision.nvfp4` on grouped operands, in plain PyTorch."""

import torch
from torch import Tensor

from model.precision import hadamard as rht
from model.precision import nvfp4
from model.precision.backend import Backend
from model.precision.nvfp4 import BLOCK, Encoded
from model.precision.operand import Encoding, Packed, Rows, gemm_dtype, pad_rows, per_row, row_amax
from model.precision.transfer import integers


def _pad_features(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))


def _in_blocks(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, BLOCK))


class Reference(Backend):
    """See `model.precision.backend.Backend`."""

    name = "reference"

    def amax(self, x: Tensor, rows: Rows, encoding: Encoding) -> Tensor:
        if encoding.row_scaled:
            return row_amax(x)
        if encoding.rotation is not None:
            x, rows = _turned(x, rows, encoding), encoding.stored(rows)
            if encoding.along == "columns":
                x = x.T
        largest = x.abs().amax(-1).float()
        if len(rows.sizes) == 1:
            return largest.amax(0, keepdim=True) if len(largest) else largest.new_zeros(1)
        return torch.segment_reduce(largest, "max", lengths=integers(rows.sizes, x.device), initial=0.0)

    def quantize(self, x: Tensor, amax: Tensor, rows: Rows, encoding: Encoding, *, packed: bool = False) -> Tensor | Packed:
        features, columns, tiles = x.shape[1], encoding.along == "columns", encoding.along == "tiles"
        padded = _turned(x, rows, encoding).float()
        blocks = _in_blocks(padded)
        bits = None
        if encoding.stream is not None:
            drawn = encoding.stream.bytes(features)
            bits = _in_blocks(pad_rows(drawn, rows).T if columns else _pad_features(drawn))
        block_amax = nvfp4.tile_amax(padded) if tiles else blocks.abs().amax(-1)
        if columns:
            amax = per_row(amax, Rows(tuple(size // BLOCK for size in encoding.stored(rows).sizes))).T
        elif not encoding.row_scaled:
            amax = per_row(amax, rows)
        encoded = nvfp4.encode(blocks, block_amax, amax, random_bits=bits, clipping=encoding.clipping, bound=encoding.bound, tile=tiles)
        if not packed:
            products = encoded.products()
            return (products.T.contiguous() if columns else products[:, :features]).to(gemm_dtype(x.device))
        codes, scales = _packed(encoded)
        if columns:
            return Packed("columns", codes.T.contiguous(), scales.T.contiguous(), features)
        return Packed(encoding.along, codes, scales[::BLOCK].contiguous() if tiles else scales, features)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        columns = packed.along == "columns"
        codes, scales = (packed.codes.T, packed.scales.T) if columns else (packed.codes, packed.scales)
        scale = scales.contiguous().view(torch.float8_e4m3fn).float().repeat_interleave(BLOCK, dim=1)
        if packed.along == "tiles":
            scale = scale.repeat_interleave(BLOCK, dim=0)
        products = (nvfp4.decode(codes) * scale).to(dtype)
        return products.T.contiguous() if columns else products[:, : packed.features]


def _turned(x: Tensor, rows: Rows, encoding: Encoding) -> Tensor:
    """x in whole blocks along its last dimension, rotated where it is to be: the transpose, for blocks along columns."""
    x = pad_rows(x, rows).T if encoding.along == "columns" else _pad_features(x)
    return x if encoding.rotation is None else rht.rotate(x, encoding.rotation)


def _packed(encoded: Encoded) -> tuple[Tensor, Tensor]:
    return nvfp4.pack(encoded.code.flatten(1), encoded.negative.flatten(1)), nvfp4.scale_bytes(encoded.scale)
