"""NVFP4 quantisation: our fused kernels, the eager reference, and other packages, on the same tensors in one run.

    python -m benchmarks.quantize                       # bf16 4096 x 4096
    python -m benchmarks.quantize shapes=layers         # operands of the linear layers of tiny, small and Nemotron 3 Super
    python -m benchmarks.quantize device=cuda to=quantize.json

Each time includes the amax. `floor` is what nobody can do without: the largest magnitude, and a copy of the tensor.

    1D       blocks of 16 along rows                              x of fprop
    2D       16 x 16 tiles                                        weights
    RHT+SR   along columns, Hadamard transform, stochastic        dy of wgrad

Results are packed, 4.5 bits an element.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import main
from benchmarks.timing import machine, medians, save, table
from model.precision import nvfp4
from model.precision.backend import Backend
from model.precision.backends.choice import choose
from model.precision.backends.reference import Reference
from model.precision.hadamard import FIXED
from model.precision.operand import Encoding, Packed, Rows
from model.precision.philox import Stream, stream_key

LAYERS = {  # tokens x features
    "tiny in_proj x": (2048, 128),
    "tiny in_proj dy": (2048, 672),
    "small experts.up_proj x": (1024, 128),
    "small shared_experts dy": (4096, 512),
    "Super in_proj x": (4096, 4096),
    "Super shared_experts dy": (4096, 5376),
}
Call = Callable[[], Any]


def ours(backend: Backend, x: Tensor) -> dict[str, Call]:
    rows = Rows((len(x),))
    index = torch.arange(len(x), device=x.device)
    stream = Stream(stream_key(1, "benchmark", "dy_t"), index, index % 128, 1)

    def quantise(encoding: Encoding) -> Call:
        return lambda: backend.quantize(x, backend.amax(x, rows, encoding), rows, encoding, packed=True)

    return {
        "1D": quantise(Encoding("rows")),
        "2D": quantise(Encoding("tiles")),
        "RHT+SR": quantise(Encoding("columns", stream, FIXED)),
    }


def torchao(x: Tensor) -> dict[str, Call]:
    """torchao's NVFP4 quantiser: 1D, rounding to nearest only."""
    module = import_module("torchao.prototype.mx_formats.nvfp4_tensor")

    def rows() -> Any:
        return module.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=module.per_tensor_amax_to_scale(x.abs().max()))

    return {"1D": rows}


def fouroversix(x: Tensor) -> dict[str, Call]:
    """fouroversix, backend pytorch (on a GPU, the one it picks), scale rule static_6. Its transform needs CUDA: on a CPU it goes without."""
    package = import_module("fouroversix")

    def quantise(**how: Any) -> Call:
        backend = {"backend": "pytorch"} if x.device.type == "cpu" else {}
        config = package.QuantizationConfig(scale_rule="static_6", **backend, **how)
        return lambda: package.quantize_to_fp4(x, config)

    return {
        "1D": quantise(),
        "2D": quantise(block_scale_2d=True),
        "RHT+SR": quantise(rht=x.is_cuda, round_style="stochastic", transpose=True),
    }


def agreement(x: Tensor, result: Any) -> float:
    """Share of a peer's 1D code bytes that are those of the definition."""
    codes = next(getattr(result, name) for name in ("qdata", "values") if hasattr(result, name))
    expected = nvfp4.quantize(x).codes
    return (codes.view(torch.uint8).reshape(expected.shape) == expected).float().mean().item()


def run(size: int, shapes: str, rounds: int, device: str, to: str) -> None:
    if shapes not in ("square", "layers"):
        raise ValueError(f"shapes={shapes} is unknown: use square or layers")
    if size % 16:
        raise ValueError(f"size={size} must be a multiple of 16")
    where = torch.device(device)
    backend = choose("auto", where)
    results: dict[str, Any] = {"machine": machine(where), "backend": backend.name, "operands": {}}
    print(f"NVFP4 quantisation of bf16 operands, {results['machine']}; medians of {rounds} alternating rounds\n")
    missing: dict[str, str] = {}
    for name, shape in {f"{size} x {size}": (size, size)}.items() if shapes == "square" else LAYERS.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(where, torch.bfloat16)
        contenders: dict[str, dict[str, Call]] = {"ours": ours(backend, x), "reference": ours(Reference(), x)}
        for peer in (torchao, fouroversix):
            try:
                contenders[peer.__name__] = peer(x)
            except ImportError as error:
                missing[peer.__name__] = str(error)
        calls = {f"{who}/{what}": call for who, kinds in contenders.items() for what, call in kinds.items()}
        calls["floor"] = lambda x=x: (x.abs().amax(), x.clone())  # type: ignore[misc]
        seconds = medians(calls, rounds, where)
        rows = [("", "ours", "GB/s", *(f"{who} / ours" for who in contenders if who != "ours"), "ours / floor")]
        for what in contenders["ours"]:
            mine = seconds[f"ours/{what}"]
            others = [seconds.get(f"{who}/{what}") for who in contenders if who != "ours"]
            rate = x.numel() * x.element_size() / mine / 1e9
            ratios = ["-" if other is None else f"{other / mine:.1f}" for other in others]
            rows.append((what, f"{mine * 1e3:.2f} ms", f"{rate:.1f}", *ratios, f"{mine / seconds['floor']:.2f}"))
        same = {who: agreement(x, kinds["1D"]()) for who, kinds in contenders.items() if who not in ("ours", "reference")}
        packed = contenders["ours"]["1D"]()
        assert isinstance(packed, Packed) and torch.equal(packed.codes, nvfp4.quantize(x).codes)
        print(f"{name}, floor {seconds['floor'] * 1e3:.2f} ms\n{table(rows)}")
        for who, share in same.items():
            print(f"1D codes of {who} that equal ours: {share:.3%}")
        print()
        results["operands"][name] = {"shape": shape, "seconds": seconds, "equal_1d_codes": same}
    for who, reason in missing.items():
        print(f"{who} is left out ({reason}): install it into a folder of its own and put that on PYTHONPATH")
    save(to, results)


DEFAULTS = {"size": 4096, "shapes": "square", "rounds": 7, "device": "cpu", "to": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
