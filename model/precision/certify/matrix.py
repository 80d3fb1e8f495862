"""A whole matrix through a backend, as `model.precision.nvfp4.quantize` defines it."""

from typing import Any

from torch import Tensor

from model.precision import nvfp4
from model.precision.backend import Backend
from model.precision.hadamard import FIXED, UNSIGNED
from model.precision.nvfp4 import BLOCK, Quantized
from model.precision.operand import Encoding, Packed, Rows
from model.precision.philox import Given


def quantize(backend: Backend, x: Tensor, **options: Any) -> Quantized:
    """What `nvfp4.quantize(x, **options)` gives, by the operations a training step uses. Raises ValueError where that does, and where the
    backend cannot."""
    nvfp4.check(x, **options)
    clipping, rotation = options.get("clipping", "saturate"), None
    if options.get("hadamard"):
        rotation = FIXED if options.get("hadamard_signs", True) else UNSIGNED
    bits, tiles, amax = options.get("random_bits"), options.get("scaling") == "2d", options.get("amax")
    encoding = Encoding(
        "tiles" if tiles else "rows",
        None if bits is None else Given(bits),
        rotation,
        clipping,
        float(options.get("e4m3_bound", 448)) if clipping != "saturate" else 448.0,
        bool(options.get("row_scaled")),
    )
    x, rows = x.contiguous(), Rows((len(x),))
    of_groups = backend.amax(x, rows, encoding) if amax is None else amax if encoding.row_scaled else amax.reshape(1)
    packed = backend.quantize(x, of_groups, rows, encoding, packed=True)
    assert isinstance(packed, Packed)
    scales = packed.scales.repeat_interleave(BLOCK, dim=0) if tiles else packed.scales
    codes = packed.codes[:, : x.shape[1] // 2].contiguous()
    return Quantized(codes, scales, of_groups if encoding.row_scaled else of_groups[0], encoding.bound)
