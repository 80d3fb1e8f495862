"""The certificate is given to backends that keep the definition, and to no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.precision.backend import Packed
from model.precision.backends.cpu import FusedCPU
from model.precision.backends.reference import Reference
from model.precision.certify import command as certify

CPU = torch.device("cpu")


def test_the_backends_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert certify.main([f"to={tmp_path / 'certificate.json'}"]) == 0
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
    def quantize_rows(self, *arguments: Any, **how: Any) -> Any:
        result = super().quantize_rows(*arguments, **how)
        if isinstance(result, Packed) and how.get("tiles") and result.scales.numel() > 8:
            result.scales.view(-1)[7] += 1
        return result


class OneCodeOff(FusedCPU):
    def quantize_columns(self, *arguments: Any, **how: Any) -> Any:
        result = super().quantize_columns(*arguments, **how)
        if isinstance(result, Packed) and how.get("hadamard"):
            result.codes.view(-1)[3] ^= 1
        return result


class Biased(Reference):
    """Draws its own bits, and never the largest ones."""

    own_draws = True

    def quantize_rows(self, x: torch.Tensor, *arguments: Any, **how: Any) -> Any:
        stream = how.get("stream")
        if stream is None:
            return super().quantize_rows(x, *arguments, **how)
        how["stream"] = FewerBits(*(getattr(stream, name) for name in stream.__dataclass_fields__))
        return super().quantize_rows(x, *arguments, **how)


class FewerBits(certify.Stream):
    def bytes(self, features: int) -> torch.Tensor:
        return super().bytes(features) & 0xF0


class WrongAlpha(Reference):
    def amax(self, *arguments: Any, **how: Any) -> torch.Tensor:
        return super().amax(*arguments, **how) * 1.25


@pytest.mark.parametrize(
    ("backend", "differs", "agrees"),
    [
        (OneScaleOff(), "random tensors: scales", "rotated vectors: scales"),
        (OneCodeOff(), "rotated random tensors: code values", "random tensors: code values"),
        (Biased(), "expectation of draws along rows, 5 sigma", "vectors: code values"),
        (WrongAlpha(), "GEMMs, fprop, within 1e-05", "vectors: code values"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Reference | FusedCPU) else "",
)
def test_a_wrong_backend_is_told_apart(backend: Any, differs: str, agrees: str) -> None:
    report = certify.Report()
    certify.check_vectors(report, backend, CPU, certify.Vectors())
    if isinstance(backend, FusedCPU):
        certify.check_random(report, backend, CPU)
    certify.check_draws(report, backend, CPU)
    certify.check_gemms(report, backend, CPU)
    assert not report.good and not report.lines[backend.name, differs].good
    assert report.lines[backend.name, agrees].good
    assert "MISMATCH" in report.text()


@pytest.mark.parametrize(
    ("argument", "words"),
    [("backend=transformer_engine", "not installed"), ("backend=gpu", "it does not exist"), ("bakend=cpu", "the keys are backend and to")],
)
def test_what_cannot_be_certified(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert certify.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and len(error.strip().splitlines()) == 1


def test_without_vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = certify.Report()
    monkeypatch.setattr(certify.Vectors, "__init__", lambda self: (tmp_path / "nvfp4_reference_vectors.json").read_text())
    certify.certify(report, Reference(), CPU)
    assert "not compared" in report.lines["reference", "vectors"].note and not report.lines["reference", "vectors"].matters
