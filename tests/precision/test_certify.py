"""The certificate is given to backends that keep the definition, and to no other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.precision.backends.cpu import FusedCPU
from model.precision.backends.reference import Reference
from model.precision.certify import checks, command
from model.precision.certify.report import Report
from model.precision.certify.vectors import Vectors
from model.precision.operand import Encoding, Packed
from model.precision.philox import Stream

CPU = torch.device("cpu")


def test_the_backends_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([f"to={tmp_path / 'certificate.json'}"]) == 0
    out = capsys.readouterr().out
    assert "Every comparison is good." in out and "MISMATCH" not in out and "transformer_engine is left out" in out
    written = json.loads((tmp_path / "certificate.json").read_text())
    compared = {(line["backend"], line["what"]): line for line in written["lines"]}
    for backend in ("reference", "cpu"):
        for what in ("vectors: scales", "vectors: code values", "rotated vectors: code values", "GEMMs, wgrad, within 1e-05"):
            line = compared[backend, what]
            assert line["good"] and line["unequal"] == 0 and line["values"] > 5000
    assert compared["cpu", "stochastic rounding: code values"]["values"] > 10**6
    assert 0 < compared["cpu", "expectation of draws along rows, 5 sigma"]["worst"] < 5


class OneScaleOff(FusedCPU):
    def quantize(self, x: Any, amax: Any, rows: Any, encoding: Encoding, *, packed: bool = False) -> Any:
        result = super().quantize(x, amax, rows, encoding, packed=packed)
        if isinstance(result, Packed) and encoding.along == "tiles" and result.scales.numel() > 8:
            result.scales.view(-1)[7] += 1
        return result


class OneCodeOff(FusedCPU):
    def quantize(self, x: Any, amax: Any, rows: Any, encoding: Encoding, *, packed: bool = False) -> Any:
        result = super().quantize(x, amax, rows, encoding, packed=packed)
        if isinstance(result, Packed) and encoding.along == "columns" and encoding.rotation is not None:
            result.codes.view(-1)[3] ^= 1
        return result


class Biased(Reference):
    """Draws its own bits, and never the largest ones."""

    draws_own_bits = True

    def quantize(self, x: Any, amax: Any, rows: Any, encoding: Encoding, *, packed: bool = False) -> Any:
        if isinstance(encoding.stream, Stream):
            encoding = replace(encoding, stream=FewerBits(**vars(encoding.stream)))
        return super().quantize(x, amax, rows, encoding, packed=packed)


class FewerBits(Stream):
    def bytes(self, features: int) -> torch.Tensor:
        return super().bytes(features) & 0xF0


class WrongAmax(Reference):
    def amax(self, *arguments: Any, **how: Any) -> torch.Tensor:
        return super().amax(*arguments, **how) * 1.25


@pytest.mark.parametrize(
    ("backend", "differs", "agrees"),
    [
        (OneScaleOff(), "random tensors: scales", "rotated vectors: scales"),
        (OneCodeOff(), "rotated random tensors: code values", "random tensors: code values"),
        (Biased(), "expectation of draws along rows, 5 sigma", "vectors: code values"),
        (WrongAmax(), "GEMMs, fprop, within 1e-05", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Reference | FusedCPU) else "",
)
def test_a_wrong_backend_is_told_apart(backend: Any, differs: str, agrees: str | None) -> None:
    report = Report()
    checks.check_vectors(report, backend, CPU, Vectors())
    if isinstance(backend, FusedCPU):
        checks.check_random(report, backend, CPU)
    checks.check_draws(report, backend, CPU)
    checks.check_gemms(report, backend, CPU)
    assert not report.good and not report.lines[backend.name, differs].good
    assert agrees is None or report.lines[backend.name, agrees].good
    assert "MISMATCH" in report.text()


@pytest.mark.parametrize(
    ("argument", "words"),
    [("backend=transformer_engine", "not installed"), ("backend=gpu", "it does not exist"), ("bakend=cpu", "the keys are backend and to")],
)
def test_what_cannot_be_certified(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and len(error.strip().splitlines()) == 1
