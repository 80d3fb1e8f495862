"""Comparing a backend with the reference, on the tensors and operations `certify` uses."""

from typing import Any

import torch

from model.precision.backend import Backend, Packed, Rows
from model.precision.certify.command import REFERENCE, operations, stream, tensor

__all__ = ["REFERENCE", "assert_equals_reference", "assert_same", "operations", "stream", "tensor"]


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
