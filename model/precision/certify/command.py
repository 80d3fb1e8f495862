"""Proves, on this machine, that every backend of NVFP4 gives the values that define it.

    python -m model.precision.certify                              # every backend this machine can run
    python -m model.precision.certify backend=transformer_engine to=certificate.json

Three kinds of evidence, a line of the table each for what was compared:

    vectors        codes, scales and amaxes Transformer Engine's reference quantizer gave, which come with the package
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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from model.precision.backend import Backend
from model.precision.backends.choice import NAMES, choose, missing
from model.precision.certify.checks import check_draws, check_gemms, check_random, check_vectors
from model.precision.certify.report import Report
from model.precision.certify.vectors import Vectors


def certify(report: Report, backend: Backend, device: torch.device) -> None:
    """Every check of one backend."""
    check_vectors(report, backend, device, Vectors())
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
    names = [name for name in NAMES if name != "auto"]
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
