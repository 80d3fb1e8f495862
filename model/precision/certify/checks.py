"""Three kinds of evidence: recorded vectors, random tensors and draws, GEMMs. Each adds its lines to a report."""

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from model.precision import nvfp4
from model.precision.backend import Backend
from model.precision.backends.reference import Reference
from model.precision.certify.matrix import quantize
from model.precision.certify.operands import operations, tensor
from model.precision.certify.report import Report, compare
from model.precision.certify.vectors import Vectors
from model.precision.formats.nvfp4 import NVFP4, NVFP4Options
from model.precision.linear import linear
from model.precision.nvfp4 import Quantized
from model.precision.operand import Encoding, Rows
from model.precision.philox import Stream, stream_key
from model.precision.site import Site, TokenKeys

TOLERANCE = 1e-5  # of a GEMM: difference over the largest element; fp32 accumulation in any order stays below
ROUNDED = 2.0**-8  # of a result in bf16: half a step between neighbours, at most
SIGMAS = 5.0
REFERENCE = Reference()


def check_vectors(report: Report, backend: Backend, device: torch.device, vectors: Vectors) -> None:
    for record in vectors.quantized:
        if vectors.records[record].get("error"):
            continue
        for transposed in (False, True):
            x, suffix = vectors.field(record, "input"), "_t" if transposed else ""
            options = vectors.options(record, transposed=transposed)
            try:
                ours = quantize(backend, (x.T.contiguous() if transposed else x).to(device), **options)
            except ValueError as error:
                report.refused(backend.name, error)
                continue
            denormal = "denorm" in record
            group = "vectors of denormals" if denormal else "rotated vectors" if options.get("hadamard") else "vectors"
            theirs = Quantized(vectors.field(record, f"qdata{suffix}"), vectors.field(record, f"qscale{suffix}"), ours.amax, ours.bound)
            matters, rotated = not (denormal and device.type == "cuda"), bool(options.get("hadamard"))
            # The reference writes an input of -0 as +0, so the signs of zeros are listed and no more.
            compare(report, backend, group, ours, theirs, matters=matters, rotated=rotated)
            amax = vectors.field(record, "amax_col" if transposed else "amax_row").flatten()
            allowed = 1.0 if rotated and backend.rotates_in_own_order else 0.0
            report.count(report.line(backend.name, f"{group}: amax", matters=matters, allowed=allowed), ours.amax.flatten(), amax)


def check_random(report: Report, backend: Backend, device: torch.device) -> None:
    own_draws = backend.draws_own_bits
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
                        compare(report, backend, part, ours(), theirs(), matters=matters, rotated=rotated)
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
    encoding = Encoding("columns" if columns else "rows")
    amax = backend.amax(on_device, rows, encoding)
    outside = report.line(backend.name, f"draws along {where} that are no neighbour")
    total = torch.zeros(operand.shape, dtype=torch.float64)
    for step in range(draws):
        key = Stream(stream_key(7, "certify", "dy"), index, index % 8, step)
        products = backend.quantize(on_device, amax, rows, replace(encoding, stream=key))
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
    options = NVFP4Options(stochastic_rounding=False, hadamard=not backend.rotates_in_own_order)
    form = NVFP4(options)
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
