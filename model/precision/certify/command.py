"""Proves, on this machine, that every backend of NVFP4 gives the values that define it.

    python -m model.precision.certify                              # every backend this machine can run
    python -m model.precision.certify backend=transformer_engine to=certificate.json

Three kinds of evidence, a line of the table each for what was compared:

    vectors        codes, scales and amaxes Transformer Engine's reference quantizer gave (in tests/vectors of a checkout)
    random tensors every operation of the interface against `model.precision.backends.reference` on the CPU: dtypes, magnitudes from 1e-30 to 1e30,
                   heavy tails, zeros, ties, groups of rows; stochastic rounding with the same random bits, or, for a backend that draws its
                   own, by its two neighbours and by its expectation
    GEMMs          fprop, dgrad and wgrad of a linear layer against fp64 products of the dequantised operands, within TOLERANCE; once more in
                   bf16 from end to end, where a backend may run the layer as a whole

Codes and scales must be equal. Apart, and no reason to fail: the sign of a zero code, and tensors of denormals on a GPU, which may flush them.
A backend may refuse an operation with a sentence; that is listed too. Exit status: 0, 1 for a mismatch, 2 for a wrong argument.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.precision import nvfp4
from model.precision.backend import BACKENDS, Backend, Packed, Rows, choose, missing
from model.precision.backends.reference import Reference
from model.precision.formats import Format, NVFP4Options
from model.precision.linear import Site, TokenKeys, linear
from model.precision.nvfp4 import Quantized
from model.precision.philox import Stream, stream_key

TOLERANCE = 1e-5  # of a GEMM: difference over the largest element; fp32 accumulation in any order stays below
ROUNDED = 2.0**-8  # of a result in bf16: half a step between neighbours, at most
SIGMAS = 5.0
ROTATED = 0.02  # share of codes that may differ where a backend sums the rotation in its own order
REFERENCE = Reference()
VECTORS = Path(__file__).resolve().parents[3] / "tests" / "vectors"


# -- what is compared ------------------------------------------------------------------------------------------------------------------------


class Vectors:
    """Records of Transformer Engine's own outputs. Raises FileNotFoundError where the checkout has none."""

    def __init__(self, directory: Path = VECTORS) -> None:
        self.records: dict[str, dict[str, Any]] = json.loads((directory / "nvfp4_reference_vectors.json").read_text())
        self.arrays = np.load(directory / "nvfp4_reference_vectors.npz")
        self.quantized = [name for name in self.records if not name.startswith("_")]

    def field(self, record: str, name: str) -> Tensor:
        tensor = torch.from_numpy(self.arrays[f"{record}/{name}"])
        return tensor.view(torch.bfloat16) if self.records[record].get(name) == "bf16bits" else tensor

    def options(self, record: str, *, transposed: bool) -> dict[str, Any]:
        """The reference's arguments in our names."""
        info = self.records[record]
        given = info["kwargs"]
        result: dict[str, Any] = {}
        if info["kind"] == "2d":
            result["scaling"] = "2d"
        if info["kind"] == "rht" and transposed:  # only the transposed operand is rotated
            result |= {"hadamard": True, "hadamard_signs": given.get("with_random_sign_mask", True)}
        if given.get("row_scaled_nvfp4"):
            result["row_scaled"] = True
        if given.get("nvfp4_use_4over6"):
            result |= {"clipping": f"4over6_{given['nvfp4_4over6_err_mode'].lower()}", "e4m3_bound": int(given["nvfp4_e4m3_max"])}
        return result


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
    whole = all(size % 16 == 0 for size in rows.sizes)
    # The reference rotates by a GEMM, whose products of denormals depend on whether the library fuses them.
    rotate = bool(x.abs().max() == 0 or x.abs().max() > 1e-35)
    amax, rotated = backend.amax(x, rows), backend.amax(x, rows, hadamard=True)

    def along_rows(amax: Tensor = amax, **how: Any) -> Callable[[], Any]:
        return lambda: backend.quantize_rows(x, amax, rows, **how)

    def along_columns(amax: Tensor = amax, **how: Any) -> Callable[[], Any]:
        return lambda: backend.quantize_columns(x, amax, rows, **how)

    yield "amax", lambda: amax
    if rotate:
        yield "rotated amax", lambda: rotated
    draws = {"": None, " stochastic": stream(len(x), device=device), " stochastic, routed": stream(len(x), expert=True, device=device)}
    if features >= 48:
        draws[" stochastic, sharded"] = stream(len(x), runs=((64, 32), (160, features - 32)), device=device)
        draws[" stochastic, odd shards"] = stream(len(x), runs=((5, 21), (40, features - 21)), device=device)
    row_amax = x.abs().amax(1, keepdim=True).float()
    for packed in (False, True):
        suffix = " packed" * packed
        for name, draw in draws.items():
            yield f"rows{name}{suffix}", along_rows(stream=draw, packed=packed)
            yield f"columns{name}{suffix}", along_columns(stream=draw, packed=packed)
            if rotate:
                yield f"rotated columns{name}{suffix}", along_columns(amax=rotated, hadamard=True, stream=draw, packed=packed)
        for clipping, bound in (("4over6_mae", 256.0), ("4over6_mse", 448.0)):
            how: dict[str, Any] = {"clipping": clipping, "bound": bound, "packed": packed}
            yield f"rows {clipping}{suffix}", along_rows(**how)
            yield f"columns {clipping}{suffix}", along_columns(**how)
            if whole and features % 16 == 0:
                yield f"tiles {clipping}{suffix}", along_rows(tiles=True, **how)
        yield f"row-scaled{suffix}", along_rows(amax=row_amax, packed=packed)
        if whole and features % 16 == 0:
            yield f"tiles{suffix}", along_rows(tiles=True, packed=packed)


# -- the table ---------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """One comparison of one backend. worst: largest difference, in the unit of what is compared. matters: whether a difference is a mismatch;
    allowed: the share of values that may differ all the same."""

    backend: str
    what: str
    values: int = 0
    unequal: int = 0
    worst: float = 0.0
    matters: bool = True
    allowed: float = 0.0
    note: str = ""

    @property
    def good(self) -> bool:
        return not self.matters or self.unequal <= self.allowed * self.values


@dataclass
class Report:
    """Comparisons, in the order in which they were first made."""

    lines: dict[tuple[str, str], Line] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def line(self, backend: str, what: str, **how: Any) -> Line:
        return self.lines.setdefault((backend, what), Line(backend, what, **how))

    def count(self, line: Line, ours: Tensor, theirs: Tensor) -> None:
        """Adds a comparison of two tensors, NaN equal to NaN."""
        a, b = ours.detach().cpu().double(), theirs.detach().cpu().double()
        if a.shape != b.shape:
            line.unequal += b.numel()
            line.values += b.numel()
            line.note = f"shape {tuple(a.shape)}, not {tuple(b.shape)}"
            return
        differs = (a != b) & ~(a.isnan() & b.isnan())
        line.values += b.numel()
        line.unequal += int(differs.sum())
        if differs.any():
            line.worst = max(line.worst, float((a - b)[differs].abs().nan_to_num(nan=float("inf")).max()))

    def refused(self, backend: str, error: ValueError) -> None:
        line = self.line(backend, "operations it refuses", matters=False)
        line.values += 1
        line.note = line.note or str(error)

    @property
    def good(self) -> bool:
        return all(line.good for line in self.lines.values())

    def text(self) -> str:
        rows = [("backend", "what", "values", "unequal", "worst", "")]
        for line in self.lines.values():
            verdict = "listed" if not line.matters else "good" if line.good else "MISMATCH"
            note = f"{verdict}{': ' + line.note if line.note else ''}"
            rows.append((line.backend, line.what, f"{line.values:,}", f"{line.unequal:,}", f"{line.worst:.3g}" if line.worst else "", note))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.rjust(width) if i in (2, 3, 4) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, (*widths, 0), strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(line.rstrip() for line in lines + [f"{name} is left out: {why}" for name, why in self.skipped.items()])


def _codes(report: Report, backend: Backend, group: str, ours: Tensor, theirs: Tensor, *, matters: bool, allowed: float) -> None:
    """Two codes a byte: values, and apart from them the signs of zeros."""
    if ours.shape != theirs.shape:
        report.count(report.line(backend.name, f"{group}: code values", matters=matters, allowed=allowed), ours, theirs)
        return
    a, b = nvfp4.decode(ours.cpu()), nvfp4.decode(theirs.cpu())
    report.count(report.line(backend.name, f"{group}: code values", matters=matters, allowed=allowed), a, b)
    zero = (a == 0) & (b == 0)
    report.count(report.line(backend.name, f"{group}: signs of zero codes", matters=False), a.signbit()[zero], b.signbit()[zero])


def _compare(report: Report, backend: Backend, group: str, ours: Any, theirs: Any, *, matters: bool, rotated: bool) -> None:
    allowed = ROTATED if rotated and getattr(backend, "own_rotation", False) else 0.0
    if isinstance(theirs, Packed | Quantized):
        scales = (s.cpu().view(torch.float8_e4m3fn).float() for s in (ours.scales, theirs.scales))
        report.count(report.line(backend.name, f"{group}: scales", matters=matters, allowed=allowed), *scales)
        _codes(report, backend, group, ours.codes, theirs.codes, matters=matters, allowed=allowed)
    else:
        report.count(report.line(backend.name, f"{group}: values", matters=matters, allowed=allowed), ours.float(), theirs.float())


# -- the three kinds of evidence ---------------------------------------------------------------------------------------------------------------


def check_vectors(report: Report, backend: Backend, device: torch.device, vectors: Vectors) -> None:
    for record in vectors.quantized:
        if vectors.records[record].get("error"):
            continue
        for transposed in (False, True):
            x, suffix = vectors.field(record, "input"), "_t" if transposed else ""
            options = vectors.options(record, transposed=transposed)
            try:
                ours = backend.quantize((x.T.contiguous() if transposed else x).to(device), **options)
            except ValueError as error:
                report.refused(backend.name, error)
                continue
            denormal = "denorm" in record
            group = "vectors of denormals" if denormal else "rotated vectors" if options.get("hadamard") else "vectors"
            theirs = Quantized(vectors.field(record, f"qdata{suffix}"), vectors.field(record, f"qscale{suffix}"), ours.amax, ours.bound)
            matters, rotated = not (denormal and device.type == "cuda"), bool(options.get("hadamard"))
            # The reference writes an input of -0 as +0, so the signs of zeros are listed and no more.
            _compare(report, backend, group, ours, theirs, matters=matters, rotated=rotated)
            amax = vectors.field(record, "amax_col" if transposed else "amax_row").flatten()
            allowed = 1.0 if rotated and getattr(backend, "own_rotation", False) else 0.0
            report.count(report.line(backend.name, f"{group}: amax", matters=matters, allowed=allowed), ours.amax.flatten(), amax)


def check_random(report: Report, backend: Backend, device: torch.device) -> None:
    own_draws = getattr(backend, "own_draws", False)
    for seed, (kind, shape, sizes) in enumerate(
        (
            ("normal", (64, 144), (64,)),
            ("heavy", (96, 80), (5, 0, 75, 16)),
            ("outlier", (48, 64), (16, 32)),
            ("zeros", (32, 48), (32,)),
            ("ties", (32, 64), (32,)),
            ("tiny_block", (48, 96), (48,)),
            ("denormal", (32, 48), (32,)),
            ("round", (64, 128), (64,)),
        )
    ):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for scale in (1.0, 1e-6) if dtype == torch.float16 else (1.0, 1e-30, 1e-6, 1e30):
                x, rows = tensor(kind, shape, scale, dtype, seed), Rows(sizes)
                tiny = bool(0 < x.abs().max() < 1e-34)
                group = "denormals" if tiny else "random tensors"
                matters = not (tiny and device.type == "cuda")
                for (what, ours), (_, theirs) in zip(operations(backend, x.to(device), rows), operations(REFERENCE, x, rows), strict=True):
                    if own_draws and "stochastic" in what:
                        continue
                    rotated, part = "rotated" in what, group
                    if not tiny:
                        part = "rotated random tensors" if rotated else "stochastic rounding" if "stochastic" in what else group
                    try:
                        _compare(report, backend, part, ours(), theirs(), matters=matters, rotated=rotated)
                    except ValueError as error:
                        report.refused(backend.name, error)


def check_draws(report: Report, backend: Backend, device: torch.device, draws: int = 256) -> None:
    """Every draw is one of two neighbours, and the mean over draws has the expectation of eight random bits."""
    _check_draws(report, backend, device, draws, columns=False)
    _check_draws(report, backend, device, draws, columns=True)


def _check_draws(report: Report, backend: Backend, device: torch.device, draws: int, *, columns: bool) -> None:
    """Along rows as dgrad quantises dy; or along columns, not rotated, so that neighbours are known."""
    x, rows = tensor("normal", (32, 64), 1.0, torch.bfloat16, 1), Rows((32,))
    where = "columns" if columns else "rows"
    operand = x.T.contiguous() if columns else x
    every = torch.stack(
        [nvfp4.quantize(operand, random_bits=torch.full(operand.shape, byte, dtype=torch.uint8)).dequantize() for byte in range(256)]
    )
    low, high = every.amin(0), every.amax(0)
    expected, variance = every.double().mean(0), every.double().var(0, correction=0)
    index = torch.arange(len(x), device=device)
    on_device = x.to(device)
    amax = backend.amax(on_device, rows)
    outside = report.line(backend.name, f"draws along {where} that are no neighbour")
    total = torch.zeros(operand.shape, dtype=torch.float64)
    for step in range(draws):
        key = Stream(stream_key(7, "certify", "dy"), index, index % 8, step)
        quantise = backend.quantize_columns if columns else backend.quantize_rows
        products = quantise(on_device, amax, rows, stream=key)
        assert isinstance(products, Tensor)
        value = products.float().cpu() * (amax.cpu() / 2688)
        value = value.T.contiguous() if columns else value
        # The factor of a value is rounded in another place here, by at most one bit.
        value = torch.where(
            torch.isclose(value, low, rtol=1e-6, atol=0), low, torch.where(torch.isclose(value, high, rtol=1e-6, atol=0), high, value)
        )
        report.count(outside, ((value < low) | (value > high)).float(), torch.zeros_like(value))
        total += value
    # By magnitude, so that a bias of one part cannot hide behind another's.
    error, share = total / draws - expected, variance / draws
    sign, order = operand.double().sign(), operand.double().abs().flatten().argsort()
    line = report.line(backend.name, f"expectation of draws along {where}, {SIGMAS:g} sigma")
    for part in order.split(256):
        deviation = float((error * sign).flatten()[part].sum() / share.flatten()[part].sum().clamp(min=1e-300).sqrt())
        line.values += 1
        line.unequal += abs(deviation) > SIGMAS
        line.worst = max(line.worst, abs(deviation))
    line.note = "worst in standard deviations"


def check_gemms(report: Report, backend: Backend, device: torch.device) -> None:
    options = NVFP4Options(stochastic_rounding=False, hadamard=not getattr(backend, "own_rotation", False))
    form = Format("nvfp4", options)
    sizes = ((64, 128, 96), (256, 512, 384))
    for seed, ((tokens, inputs, outputs), dtype) in enumerate(product(sizes, (torch.float32, torch.bfloat16))):
        generator = torch.Generator().manual_seed(seed)
        shapes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        x, w, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
        weight = torch.nn.Parameter(w.to(device))
        given = x.to(device).requires_grad_()
        index = torch.arange(tokens, device=device)
        try:
            y = linear(given, weight, (form, form, form), Site("certify", 0, backend=backend), TokenKeys(index, index), 0)
            y.backward(dy.to(device))
        except ValueError as error:
            report.refused(backend.name, error)
            return
        y, dx, dw = y.detach(), given.grad, weight.grad
        assert dx is not None and dw is not None

        def values(operand: Tensor, **how: Any) -> Tensor:
            return nvfp4.quantize(operand.contiguous(), **how).dequantize().double()

        weights = values(w, scaling="2d")
        turned = [values(operand.T, hadamard=options.hadamard) for operand in (dy, x)]
        for name, ours, theirs in (
            ("fprop", y, values(x) @ weights.T),
            ("dgrad", dx, values(dy) @ weights),
            ("wgrad", dw, turned[0] @ turned[1].T),
        ):
            tolerance = TOLERANCE + (ROUNDED if dtype == torch.bfloat16 else 0.0)
            kind = "GEMMs" if dtype == torch.float32 else "bf16 layer"
            line = report.line(backend.name, f"{kind}, {name}, within {tolerance:.2g}", note="worst over the largest element")
            difference = (ours.detach().cpu().double() - theirs).abs() / theirs.abs().max()
            line.values += theirs.numel()
            line.unequal += int((~(difference <= tolerance)).sum())
            line.worst = max(line.worst, float(difference.nan_to_num(nan=float("inf")).max()))


def certify(report: Report, backend: Backend, device: torch.device) -> None:
    """Every check of one backend."""
    try:
        check_vectors(report, backend, device, Vectors())
    except FileNotFoundError as error:
        report.line(backend.name, "vectors", matters=False, note=f"not compared: {error.filename} does not exist, use a checkout")
    if backend.name != "reference" or device.type != "cpu":  # the reference on a CPU is what the others are compared with
        check_random(report, backend, device)
    check_draws(report, backend, device)
    check_gemms(report, backend, device)


def device_of(name: str) -> torch.device:
    """Where a backend runs on this machine; the reference on the CPU, where it is the definition."""
    return torch.device("cuda" if torch.cuda.is_available() and name not in ("cpu", "reference") else "cpu")


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    names = [name for name in BACKENDS if name != "auto"]
    if unknown := given.keys() - {"backend", "to"}:
        print(f"error: {sorted(unknown)[0]!r} is unknown here: the keys are backend and to", file=sys.stderr)
        return 2
    report = Report()
    for name in names:
        lacking = missing(name, device_of(name))
        if lacking is not None:
            report.skipped[name] = lacking
    wanted = given.get("backend")
    if wanted is not None:
        if wanted not in names or wanted in report.skipped:
            why = report.skipped.get(wanted, f"it does not exist: use one of {', '.join(names)}")
            print(f"error: backend={wanted} cannot be certified here: {why}", file=sys.stderr)
            return 2
        report.skipped.clear()
        names = [wanted]
    for name in names:
        if name not in report.skipped:
            certify(report, choose(name, device_of(name)), device_of(name))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    print(f"NVFP4 backends on this machine ({device}, torch {torch.__version__})\n\n{report.text()}")
    print(f"\n{'Every comparison is good.' if report.good else 'MISMATCH: these backends do not give the defined values.'}")
    if "to" in given:
        lines = [asdict(line) | {"good": line.good} for line in report.lines.values()]
        to = Path(given["to"])
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps({"device": device, "lines": lines, "skipped": report.skipped}, indent=1) + "\n")
    return 0 if report.good else 1
