"""Formats and backends under short names, and comparing a backend with the reference, on the tensors and operations `certify` uses."""

from typing import Any

import torch

from model.precision.backend import Backend
from model.precision.backends.reference import Reference
from model.precision.certify.operands import operations, stream, tensor
from model.precision.formats.bf16 import BF16 as BF16Format
from model.precision.formats.fp32 import FP32 as FP32Format
from model.precision.formats.mxfp8 import MXFP8 as MXFP8Format
from model.precision.formats.nvfp4 import NVFP4 as NVFP4Format
from model.precision.formats.nvfp4 import NVFP4Options
from model.precision.operand import Packed, Rows
from model.precision.site import Site

__all__ = ["operations", "stream", "tensor"]

REFERENCE = Reference()
FP32, BF16, MXFP8, NVFP4 = FP32Format(), BF16Format(), MXFP8Format(), NVFP4Format()


def nvfp4_with(**options: Any) -> NVFP4Format:
    return NVFP4Format(NVFP4Options(**options))


def site(name: str = "m", seed: int = 5, backend: Backend = REFERENCE, **where: Any) -> Site:
    return Site(name, seed, backend=backend, **where)


def assert_same(ours: Any, reference: Any, what: str) -> None:
    """Bit for bit; the sign of a zero product does not count, for it changes no product."""
    if isinstance(reference, Packed):
        assert ours.along == reference.along and ours.features == reference.features, what
        assert torch.equal(ours.scales.cpu(), reference.scales.cpu()), f"{what}: scales differ"
        assert torch.equal(ours.codes.cpu(), reference.codes.cpu()), f"{what}: codes differ"
        return
    assert ours.dtype == reference.dtype and ours.shape == reference.shape, what
    assert torch.equal(ours.cpu(), reference.cpu()), f"{what}: {(ours.cpu() != reference.cpu()).sum()} of {ours.numel()} differ"


def assert_equals_reference(backend: Backend, x: torch.Tensor, rows: Rows) -> None:
    for (what, compute), (_, reference) in zip(operations(backend, x, rows), operations(REFERENCE, x, rows), strict=True):
        ours, theirs = compute(), reference()
        assert_same(ours, theirs, what)
        if isinstance(theirs, Packed):
            assert_same(backend.unpack(theirs, torch.float32), REFERENCE.unpack(theirs, torch.float32), f"{what}, unpacked")
