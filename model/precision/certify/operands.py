"""The operands on which backends are compared, and every operation of the interface on one of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.precision.backend import Backend
from model.precision.hadamard import FIXED, Rotation
from model.precision.operand import Encoding, Rows
from model.precision.philox import Stream, stream_key

OTHER = Rotation.drawn((1, 2), 3)  # signs that are not the fixed ones


def tensor(kind: str, shape: tuple[int, int], scale: float, dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    """kind: normal, heavy (Cauchy tails), outlier, zeros (all or in blocks), ties (on the grid's midpoints), denormal, tiny_block, and round
    (amax 5: where orders of operations differ, they show)."""
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
    elif kind == "round":
        x = x.clamp(-5, 5)
        x[seed % shape[0], 0] = 5
    limit = torch.finfo(dtype).max / 4
    return (x * scale).clamp(-limit, limit).to(dtype).to(device)


def stream(rows: int, *, runs: tuple[tuple[int, int], ...] = (), expert: bool = False, device: str = "cpu") -> Stream:
    index = torch.arange(rows, device=device)
    return Stream(stream_key(3, "m", "dy"), index // 8 + 2**31, index % 8, 11, runs, index // 16 if expert else None)


def operations(backend: Backend, x: Tensor, rows: Rows) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every operation of the interface on one operand of whole blocks along features, by name."""
    features, device = x.shape[1], str(x.device)
    whole = all(size % 16 == 0 for size in rows.sizes) and features % 16 == 0
    # The reference rotates by a GEMM, whose products of denormals depend on whether the library fuses them.
    rotate = bool(x.abs().max() == 0 or x.abs().max() > 1e-35)
    draws = {"": None, " stochastic": stream(len(x), device=device), " stochastic, routed": stream(len(x), expert=True, device=device)}
    if features >= 48:
        draws[" stochastic, sharded"] = stream(len(x), runs=((64, 32), (160, features - 32)), device=device)
        draws[" stochastic, odd shards"] = stream(len(x), runs=((5, 21), (40, features - 21)), device=device)

    def both(name: str, encoding: Encoding) -> Iterator[tuple[str, Callable[[], Any]]]:
        amax = backend.amax(x, rows, encoding)
        yield name, lambda: backend.quantize(x, amax, rows, encoding)
        yield f"{name} packed", lambda: backend.quantize(x, amax, rows, encoding, packed=True)

    plain, down = Encoding("rows"), Encoding("columns", rotation=FIXED)
    yield "amax", lambda: backend.amax(x, rows, plain)
    if rotate:
        yield "rotated amax", lambda: backend.amax(x, rows, down)
    for name, draw in draws.items():
        yield from both(f"rows{name}", replace(plain, stream=draw))
        yield from both(f"columns{name}", Encoding("columns", draw))
        if rotate:
            yield from both(f"rotated columns{name}", replace(down, stream=draw))
    if rotate and features % 16 == 0:
        yield from both("rotated rows stochastic", Encoding("rows", draws[" stochastic"], FIXED))
        yield from both("rows rotated otherwise", Encoding("rows", rotation=OTHER))
    if rotate:
        yield from both("columns rotated otherwise", Encoding("columns", rotation=OTHER))
    for clipping, bound in (("4over6_mae", 256.0), ("4over6_mse", 448.0)):
        how: dict[str, Any] = {"clipping": clipping, "bound": bound}
        yield from both(f"rows {clipping}", Encoding("rows", **how))
        yield from both(f"columns {clipping}", Encoding("columns", **how))
        if whole:
            yield from both(f"tiles {clipping}", Encoding("tiles", **how))
    yield from both("row-scaled", Encoding("rows", row_scaled=True))
    if whole:
        yield from both("tiles", Encoding("tiles"))
