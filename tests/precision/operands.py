"""What every backend is compared on: awkward tensors, and all operations of the interface."""

from collections.abc import Iterator
from typing import Any

import torch

from model.precision.backend import Backend, Packed, Rows
from model.precision.philox import Stream, stream_key
from model.precision.reference import Reference

REFERENCE = Reference()


def tensor(kind: str, shape: tuple[int, int], scale: float, dtype: torch.dtype, seed: int, device: str = "cpu") -> torch.Tensor:
    """kind: normal, heavy (Cauchy tails), outlier, zeros (all or in blocks), ties (on the grid's midpoints), denormal, tiny_block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if kind == "heavy":
        x = x / torch.randn(*shape, generator=generator).abs().clamp(min=1e-4)
    elif kind == "outlier":
        x[seed % shape[0], seed % shape[1]] = 1e4
    elif kind == "zeros":
        x[torch.rand(*shape, generator=generator) < 0.7] = 0
        x[: shape[0] // 2, : shape[1] // 2] = 0
    elif kind == "ties":
        x = torch.randint(-24, 25, shape, generator=generator) * 0.25
    elif kind == "denormal":
        return (x * 1e-39).to(dtype).to(device)
    elif kind == "tiny_block":
        x[:, : shape[1] // 2] *= 1e-6
    limit = torch.finfo(dtype).max / 4
    return (x * scale).clamp(-limit, limit).to(dtype).to(device)


def stream(rows: int, *, runs: tuple[tuple[int, int], ...] = (), expert: bool = False, device: str = "cpu") -> Stream:
    index = torch.arange(rows, device=device)
    return Stream(stream_key(3, "m", "dy"), index // 8 + 2**31, index % 8, 11, runs, index // 16 if expert else None)


def operations(backend: Backend, x: torch.Tensor, rows: Rows) -> Iterator[tuple[str, Any]]:
    """Every operation of the interface on one operand of whole blocks along features, by name."""
    features, device = x.shape[1], str(x.device)
    whole = all(size % 16 == 0 for size in rows.sizes)
    # The reference rotates by a GEMM, whose products of denormals depend on whether the library fuses them.
    rotate = bool(x.abs().max() == 0 or x.abs().max() > 1e-35)
    amax, rotated = backend.amax(x, rows), backend.amax(x, rows, hadamard=True)
    yield "amax", amax
    if rotate:
        yield "amax after rotation", rotated
    draws = {"": None, " stochastic": stream(len(x), device=device), " routed": stream(len(x), expert=True, device=device)}
    if features >= 48:
        draws[" sharded"] = stream(len(x), runs=((64, 32), (160, features - 32)), device=device)
        draws[" odd shards"] = stream(len(x), runs=((5, 21), (40, features - 21)), device=device)
    for packed in (False, True):
        suffix = " packed" * packed
        for name, draw in draws.items():
            yield f"rows{name}{suffix}", backend.quantize_rows(x, amax, rows, stream=draw, packed=packed)
            yield f"columns{name}{suffix}", backend.quantize_columns(x, amax, rows, stream=draw, packed=packed)
            if rotate:
                turned = backend.quantize_columns(x, rotated, rows, hadamard=True, stream=draw, packed=packed)
                yield f"rotated columns{name}{suffix}", turned
        for clipping, bound in (("4over6_mae", 256.0), ("4over6_mse", 448.0)):
            how: dict[str, Any] = {"clipping": clipping, "bound": bound, "packed": packed}
            yield f"rows {clipping}{suffix}", backend.quantize_rows(x, amax, rows, **how)
            yield f"columns {clipping}{suffix}", backend.quantize_columns(x, amax, rows, **how)
            if whole and features % 16 == 0:
                yield f"tiles {clipping}{suffix}", backend.quantize_rows(x, amax, rows, tiles=True, **how)
        row_amax = x.abs().amax(1, keepdim=True).float()
        yield f"row-scaled{suffix}", backend.quantize_rows(x, row_amax, rows, packed=packed)
        if whole and features % 16 == 0:
            yield f"tiles{suffix}", backend.quantize_rows(x, amax, rows, tiles=True, packed=packed)


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
    for (what, ours), (_, theirs) in zip(operations(backend, x, rows), operations(REFERENCE, x, rows), strict=True):
        assert_same(ours, theirs, what)
        if isinstance(theirs, Packed):
            assert_same(backend.unpack(theirs, torch.float32), REFERENCE.unpack(theirs, torch.float32), f"{what}, unpacked")
