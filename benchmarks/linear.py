"""A linear layer in full NVFP4 (2D weights, Hadamard transform, stochastic rounding) against the same in fp32 (bf16 on a GPU).

    python -m benchmarks.linear                          # 1024 and 2048: tokens = inputs = outputs
    python -m benchmarks.linear sizes=[512,4096] rounds=5 device=cuda

A step is forward and backward of its microbatches, both gradients included; weights are quantised in the first. Contenders take turns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import main
from benchmarks.timing import machine, medians, save, table
from model.precision.backends.choice import choose
from model.precision.formats.nvfp4 import NVFP4
from model.precision.linear import linear
from model.precision.site import Site, TokenKeys

MICROBATCHES = 4


def step(
    size: int, formats: Any, microbatches: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Any], Callable[[], int]]:
    """A whole step through our linear layer, and the bytes one forward pass keeps for its backward pass, x itself apart."""
    x, w, dy = operands(size, device, dtype)
    w.requires_grad_()
    x.requires_grad_()
    w.main_grad = torch.zeros(w.shape, device=device)  # type: ignore[attr-defined]
    index, ordinals = torch.arange(size, device=device), torch.arange(size, device=device) % 128
    site = Site("benchmark", 1, backend=choose("auto", device))
    keys = TokenKeys(index, ordinals)
    given = [tensor.data_ptr() for tensor in (w, index, ordinals)]  # there anyway

    def run() -> None:
        site.weights.clear()
        for _ in range(microbatches):
            x.grad = None
            linear(x, w, formats, site, keys, 1).backward(dy)

    def kept() -> int:
        context: Any = linear(x, w, formats, site, keys, 1).grad_fn
        while not hasattr(context, "call"):  # behind a view
            context = context.next_functions[0][0]
        return sum(t.nbytes for t in context.saved_tensors if t.data_ptr() not in given)

    return run, kept


def plain(size: int, microbatches: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    x, w, dy = operands(size, device, dtype)
    w.requires_grad_()
    x.requires_grad_()

    def run() -> None:
        w.grad = None
        for _ in range(microbatches):
            x.grad = None
            torch.nn.functional.linear(x, w).backward(dy)

    return run


def operands(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(3))
    return x, w, dy


def run(sizes: list[int], rounds: int, device: str, to: str) -> None:
    if wrong := [size for size in sizes if size % 16]:
        raise ValueError(f"sizes={wrong} must be multiples of 16")
    where = torch.device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    nvfp4 = (NVFP4(),) * 3
    name = str(dtype).removeprefix("torch.")
    results: dict[str, Any] = {"machine": machine(where), "sizes": {}}
    print(f"Linear layer, forward + backward, {results['machine']}; medians of {rounds} alternating rounds\n")
    rows = [("size", f"{name} x 1", "NVFP4 x 1", "ratio", f"{name} x {MICROBATCHES}", f"NVFP4 x {MICROBATCHES}", "ratio", "kept of x")]
    for size in sizes:
        one, kept = step(size, nvfp4, 1, where, dtype)
        contenders = {
            "plain/1": plain(size, 1, where, dtype),
            "nvfp4/1": one,
            "plain/4": plain(size, MICROBATCHES, where, dtype),
            "nvfp4/4": step(size, nvfp4, MICROBATCHES, where, dtype)[0],
        }
        seconds = medians(contenders, rounds, where)
        bits = kept() * 8 / size**2
        a, b, c, d = (seconds[key] for key in contenders)
        rows.append((str(size), _ms(a), _ms(b), f"{b / a:.2f}", _ms(c), _ms(d), f"{d / c:.2f}", f"{bits:.2f} bits"))
        results["sizes"][size] = {"seconds": seconds, "ratio": b / a, "ratio_of_4": d / c, "kept_bits": bits}
    print(table(rows))
    print(f"\nkept of x: what the backward pass needs of an element of x, in {name} {torch.finfo(dtype).bits} bits")
    save(to, results)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


DEFAULTS = {"sizes": [1024, 2048], "rounds": 9, "device": "cpu", "to": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
