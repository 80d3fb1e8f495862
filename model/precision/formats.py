"""The number formats a GEMM may run in, and NVFP4's options."""

from dataclasses import dataclass, field
from typing import Literal

FormatName = Literal["fp32", "bf16", "mxfp8", "nvfp4"]
Gemm = Literal["fprop", "dgrad", "wgrad"]
FORMATS: tuple[FormatName, ...] = ("fp32", "bf16", "mxfp8", "nvfp4")
GEMMS: tuple[Gemm, ...] = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class NVFP4Options:
    """How operands become NVFP4; the defaults are the recipe Nemotron 3 Super was trained with."""

    weight_scaling: Literal["1d", "2d"] = "2d"  # 2d: one scale per 16x16 tile, so W and its transpose get the same values
    stochastic_rounding: bool = True  # of dy, in dgrad and wgrad; never of weights or forward activations
    hadamard: bool = True  # random Hadamard transform of both wgrad operands, over 16 tokens
    clipping: Literal["saturate", "4over6_mae", "4over6_mse"] = "saturate"  # 4over6: forward operands only
    e4m3_bound: Literal[448, 256] = 448  # largest block scale used with 4over6
    row_scaled: bool = False  # one amax per row of the forward activation


@dataclass(frozen=True)
class Format:
    """A format and, for NVFP4, its options."""

    name: FormatName
    nvfp4: NVFP4Options = field(default_factory=NVFP4Options)

    def __str__(self) -> str:
        return self.name


Formats = tuple[Format, Format, Format]  # of fprop, dgrad, wgrad

FP32 = Format("fp32")
BF16 = Format("bf16")
MXFP8 = Format("mxfp8")
