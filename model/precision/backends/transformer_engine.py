"""NVIDIA's Transformer Engine (TE 2.20.2): FP4 quantisation kernels and FP4 tensor cores, on Blackwell GPUs.

TE can be used at two levels, and so it is here:

    recipe       one object for a whole module; TE's own layers derive all quantizers from it     `transformer_engine_layers`, `layer` below
    quantizer    one object for one operand                                                     the rest of `TransformerEngine`

A recipe is coarser than ours: one quantizer serves both uses of x (fprop along features, wgrad along tokens), so formats that differ between
fprop, dgrad and wgrad, or options meant for fprop alone, cannot be written down. A module whose formats one recipe expresses runs as TE's own
layer, the fastest way; any other, and routed experts, run operand by operand. So does every module in a step that measures its operands
(`monitor.quantization`), because TE's layer shows none of them. Nothing is approximated in silence.

What TE computes elsewhere in other bits than the definition in `model.precision.nvfp4`:

    random draws   stochastic rounding draws from PyTorch's CUDA generator, not from our Philox stream: a `Stream` only says that it rounds
                   stochastically. Another layout, or a resume without the generator's state, draws other bits.
    rotation       summed by tensor cores in another order, and in bf16 only
    zeros          the sign of a zero code; denormal inputs may be flushed

Trade-off: FP4 tensor cores multiply up to four times as fast as bf16 ones, for code that runs on one generation of GPUs.
`python -m model.precision.certify backend=transformer_engine` compares it with the definition on such a machine.
Source: TE 2.20.2, its recipe, tensor and GEMM modules and its PyTorch extension.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from model.precision.backend import Asked, Backend
from model.precision.backends.reference import Reference
from model.precision.backends.transformer_engine_layers import Layer, Layers, expressible
from model.precision.hadamard import FIXED, UNSIGNED
from model.precision.nvfp4 import BLOCK, MAX_CODE
from model.precision.operand import Encoding, Packed, Rows, gemm_dtype, pad_rows
from model.precision.philox import Given

CAPABILITIES = ((10, 0), (10, 3))  # TE's NVFP4 training kernels: B200, B300
ALIGNED_INNER = 32  # FP4 GEMMs load 16 bytes
SCALE_ROWS, SCALE_COLUMNS = 128, 4  # TE pads arrays of scales to these
# Each replaces a division or an error measure by an approximation, and with it codes.
FAST_MATH = ("NVTE_USE_FAST_MATH", "NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH")


def _modules() -> tuple[Any, Any]:
    """transformer_engine.pytorch and its compiled extension."""
    # In this order: the package loads the libraries the extension needs.
    return importlib.import_module("transformer_engine.pytorch"), importlib.import_module("transformer_engine_torch")


# -- operands ------------------------------------------------------------------------------------------------------------------------------


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """x with zero rows and columns after its own, up to multiples."""
    right, below = -x.shape[1] % columns, -x.shape[0] % rows
    return torch.nn.functional.pad(x, (0, right, 0, below)) if right or below else x


def _transpose_codes(codes: Tensor) -> Tensor:
    """uint8 [M, N / 2] of a matrix to [N, M / 2] of its transpose."""
    index = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).T
    return index[:, ::2] | (index[:, 1::2] << 4)


class TransformerEngine(Backend):
    """See `model.precision.backend.Backend`; raises ValueError for what TE cannot do.

    Every group of rows is quantised by a call of its own with the amax given. Products come from packed operands by plain PyTorch; `multiply`
    takes packed operands to the FP4 tensor cores without that detour.
    """

    name = "transformer_engine"
    draws_own_bits = True
    rotates_in_own_order = True
    multiplies_packed = True

    def __init__(self) -> None:
        self._te, self._tex = _modules()
        self._quantizers: dict[tuple[Any, ...], Any] = {}
        self._plain = Reference()
        self._layers = Layers(self._te)

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        if importlib.util.find_spec("transformer_engine") is None:
            return "the transformer-engine package is not installed: pip install -c constraints.txt -e '.[te]' on a machine with CUDA"
        if device.type != "cuda":
            return f"it needs a Blackwell GPU, and this run is on {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability not in CAPABILITIES:
            return (
                f"it needs a GPU of compute capability 10.0 or 10.3 (Blackwell), and this one has {capability[0]}.{capability[1]}: "
                "use precision.backend=triton"
            )
        for name in FAST_MATH:
            if os.environ.get(name, "0") not in ("", "0"):
                return f"the environment variable {name} changes the values of NVFP4: unset it"
        try:
            _, extension = _modules()
        except Exception as error:  # TE raises many kinds when its parts do not fit each other or the driver
            return (
                f"the transformer-engine package does not import ({str(error).strip().splitlines()[0] if str(error).strip() else error!r})"
            )
        if getattr(extension, "nvfp4_quantize_with_amax", None) is None:
            return "this version of transformer-engine cannot quantise with a given amax: pip install -c constraints.txt -e '.[te]' installs 2.20.2"
        return None

    @classmethod
    def check(cls, formats: Iterable[Asked], *, compute: str, amax_scope: str) -> None:
        for form in formats:
            if form.name != "nvfp4":
                continue
            if form.options.hadamard and compute != "bf16":
                raise ValueError(
                    f"precision.compute={compute} with precision.backend=transformer_engine cannot rotate operands, which Transformer Engine does "
                    "in bf16 only: use precision.compute=bf16, precision.nvfp4.hadamard=false or precision.backend=triton"
                )
            if form.options.row_scaled and amax_scope == "tensor_parallel":
                raise ValueError(
                    "precision.amax_scope=tensor_parallel with precision.nvfp4.row_scaled=true cannot run with "
                    "precision.backend=transformer_engine, which takes the amax of every row itself: use precision.amax_scope=local or "
                    "precision.backend=triton"
                )

    @classmethod
    def describe(cls, modules: Sequence[tuple[str, tuple[Asked, Asked, Asked], bool]]) -> str:
        plain = [(name, formats) for name, formats, routed in modules if not routed]
        whole = sum(expressible(formats, name) for name, formats in plain)
        return (
            f"NVFP4 backend: {cls.name}; {whole} of {len(plain)} linear modules by layers of its own, the others and routed experts operand by "
            "operand (where MXFP8 is multiplied in bf16)"
        )

    def layer(self, name: str, x: Tensor, weight: Tensor, formats: tuple[Asked, Asked, Asked]) -> Layer | None:
        return self._layers.find(name, x, weight, formats)

    def _quantizer(self, device: torch.device, **options: Any) -> Any:
        key = (device, *sorted(options.items()))
        if key not in self._quantizers:
            quantizer = self._te.NVFP4Quantizer(**options)
            quantizer.internal = True  # plain storage, no tensor subclass that takes part in autograd
            self._quantizers[key] = quantizer
        return self._quantizers[key]

    def _encode(
        self,
        x: Tensor,
        amax: Tensor | None,
        encoding: Encoding,
        *,
        columns: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [M, N], multiples of 16, as codes uint8 [M, N / 2], scales uint8 [M, N / 16] and amax; of its transpose with `columns`, along
        which alone TE rotates. amax: fp32 of one element; None: one for each row, TE's own.
        """
        rotation, clipping, stochastic = encoding.rotation, encoding.clipping, encoding.stream is not None
        if rotation not in (None, FIXED, UNSIGNED):
            raise ValueError("Transformer Engine rotates by its own signs only, not by drawn ones: use precision.backend=triton")
        if rotation is not None and x.dtype != torch.bfloat16:
            raise ValueError(
                f"Transformer Engine rotates bf16 operands only, not {str(x.dtype).removeprefix('torch.')}: "
                "use precision.compute=bf16, precision.nvfp4.hadamard=false or precision.backend=triton"
            )
        if clipping != "saturate" and rotation is not None:
            raise ValueError(f"Transformer Engine has no clipping={clipping} with the Hadamard transform")
        with torch.cuda.device_of(x):  # quantizers are made, and kernels launched, on the current device
            quantizer = self._quantizer(
                x.device,
                rowwise=not columns,
                columnwise=columns,
                with_rht=rotation is not None,
                with_post_rht_amax=rotation is not None,
                with_random_sign_mask=rotation != UNSIGNED,
                with_2d_quantization=encoding.along == "tiles",
                stochastic_rounding=stochastic,
                row_scaled_nvfp4=amax is None,
                nvfp4_use_4over6=clipping != "saturate",
                nvfp4_e4m3_max=int(encoding.bound),
                nvfp4_4over6_err_mode="MSE" if clipping == "4over6_mse" else "MAE",
            )
            if amax is None:
                result = self._tex.quantize(x.detach(), quantizer)
            else:
                one = amax.detach().reshape(1)
                result = self._tex.nvfp4_quantize_with_amax(x.detach(), quantizer, one, one)
        along = "columnwise" if columns else "rowwise"
        codes, scales = getattr(result, f"_{along}_data"), getattr(result, f"_{along}_scale_inv")
        inner, outer = x.shape if columns else x.shape[::-1]
        codes, scales = codes.view(torch.uint8).reshape(outer, inner // 2), scales.view(torch.uint8)[:outer, : inner // BLOCK]
        return codes, scales, getattr(result, f"_amax_{along}")

    def _row_scaled(self, x: Tensor, amax: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
        if encoding.stream is not None:
            raise ValueError("Transformer Engine scales rows one by one with rounding to nearest only")
        codes, scales, own = self._encode(_pad(x, BLOCK, BLOCK), None, encoding)
        if not torch.equal(own.reshape(-1)[: len(x)], amax.reshape(-1)):
            raise ValueError(
                "Transformer Engine takes the amax of every row itself, but other ones were given: "
                "use precision.amax_scope=local, precision.nvfp4.row_scaled=false or precision.backend=triton"
            )
        return codes[: len(x)], scales[: len(x)]

    def _each(self, x: Tensor, amax: Tensor, rows: Rows) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Of every group that has rows: those, padded with zeros to whole blocks both ways, its amax, and how many rows are its own."""
        padded = _pad(pad_rows(x, rows), 1, BLOCK)
        for (start, stop), size, largest in zip(rows.padded(BLOCK).bounds, rows.sizes, amax, strict=True):
            if size:
                yield padded[start:stop], largest, size

    def amax(self, x: Tensor, rows: Rows, encoding: Encoding) -> Tensor:
        return self._plain.amax(x, rows, encoding)

    def quantize(self, x: Tensor, amax: Tensor, rows: Rows, encoding: Encoding, *, packed: bool = False) -> Tensor | Packed:
        features = x.shape[1]
        if isinstance(encoding.stream, Given):
            raise ValueError("Transformer Engine draws its random bits itself: use precision.backend=triton to give them")
        encoded = []
        if encoding.row_scaled:
            encoded += [self._row_scaled(x, amax, encoding)] if len(x) else []
        else:
            for part, largest, size in self._each(x, amax, rows):
                if encoding.along == "columns":
                    codes, scales, _ = self._encode(part, largest, encoding, columns=True)
                    encoded.append((codes[:features].T, scales[:features].T))
                    continue
                turned = encoding.rotation is not None  # along rows: TE's columns are the rows of the transpose
                codes, scales, _ = self._encode(part.T.contiguous() if turned else part, largest, encoding, columns=turned)
                # TE repeats the scale of a tile for each of its rows.
                encoded.append((codes[:size], scales[:size:BLOCK] if encoding.along == "tiles" else scales[:size]))
        blocks = _up(features, BLOCK) // BLOCK
        wide = (features, features) if encoding.along == "columns" else (blocks * BLOCK // 2, blocks)
        result = Packed(encoding.along, *_joined(encoded, *wide, x.device), features)
        return result if packed else self.unpack(result, gemm_dtype(x.device))

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return self._plain.unpack(packed, dtype)

    # -- FP4 tensor cores ------------------------------------------------------------------------------------------------------------------

    def multiply(
        self, left: Packed, left_amax: Tensor, left_largest: float, right: Packed, right_amax: Tensor, right_largest: float, *, across: bool
    ) -> Tensor:
        a, rows = self._side(left, left_amax, left_largest / MAX_CODE, False)
        b, columns = self._side(right, right_amax, right_largest / MAX_CODE, across)
        # In TE's notation, column-major, the second operand comes first.
        gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions").general_gemm
        product = gemm(b, a, out_dtype=torch.float32, layout="TN")[0]
        return product[:rows, :columns]

    def _side(self, packed: Packed, amax: Tensor, bound: float, across: bool) -> tuple[Any, int]:
        """A packed operand as TE's GEMM takes it, blocks along its last dimension, and how many of its rows count."""
        if across and packed.along != "tiles":
            raise ValueError(f"only tiles can be multiplied along either side, not {packed.along}")
        codes, scales = packed.codes, packed.scales
        count = packed.features if packed.along == "columns" or across else len(codes)
        if packed.along == "columns":
            codes, scales = codes.T, scales.T  # two rows a byte become two columns a byte
        elif packed.along == "tiles":
            if across:
                codes, scales = _transpose_codes(codes), scales.T
            scales = scales.repeat_interleave(BLOCK, dim=0)
        storage = importlib.import_module("transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage").NVFP4TensorStorage
        with torch.cuda.device_of(codes):
            quantizer = self._quantizer(
                codes.device, rowwise=True, columnwise=False, nvfp4_use_4over6=bound != 448.0, nvfp4_e4m3_max=int(bound)
            )
        return (
            storage(
                rowwise_data=_pad(codes, BLOCK, ALIGNED_INNER // 2).contiguous(),
                rowwise_scale_inv=_pad(scales, SCALE_ROWS, SCALE_COLUMNS).contiguous(),
                columnwise_data=None,
                columnwise_scale_inv=None,
                amax_rowwise=amax.detach().reshape(1),
                amax_columnwise=None,
                fp4_dtype=quantizer.dtype,
                quantizer=quantizer,
                with_gemm_swizzled_scales=False,
                nvfp4_use_4over6=bound != 448.0,
                nvfp4_e4m3_max=int(bound),
            ),
            count,
        )


def _joined(encoded: list[tuple[Tensor, Tensor]], codes: int, scales: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales of all groups, below each other; `codes` and `scales` are their columns, where there is no group."""
    if not encoded:
        return tuple(torch.empty(0, n, dtype=torch.uint8, device=device) for n in (codes, scales))  # type: ignore[return-value]
    return torch.cat([c for c, _ in encoded]).contiguous(), torch.cat([s for _, s in encoded]).contiguous()
