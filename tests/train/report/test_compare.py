"""The comparison of two runs that ends in a report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.report.runs import make_run
from train.report import compare


def test_compare_trains_both_with_the_same_keys(tmp_path: Path) -> None:
    to, runs = compare.commands([f"to={tmp_path}", "train.steps=7", "+data.x=1", "recipe=small"])
    assert to == tmp_path and list(runs) == [tmp_path / "fp32", tmp_path / "nvfp4"]
    fp32, nvfp4 = runs.values()
    head = [sys.executable, "-m", "train", "-cn", "small"]
    tail = ["train.steps=7", "+data.x=1"]
    assert fp32 == [*head, f"run.dir={tmp_path}/fp32", "run.name=fp32", "precision=fp32", *tail]
    assert nvfp4 == [*head, f"run.dir={tmp_path}/nvfp4", "run.name=nvfp4", *tail]


@pytest.mark.parametrize("argument", ["run.dir=x", "precision=bf16", "train.steps=1,2", "nonsense"])
def test_compare_refuses(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([argument]) == 2
    assert capsys.readouterr().err.startswith(f"error: '{argument}'")


def test_compare_draws_both_or_reports_the_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        assert not check
        directory = Path(next(a for a in command if a.startswith("run.dir=")).removeprefix("run.dir="))
        trained.append(directory.name)
        if directory.name in failing:
            return subprocess.CompletedProcess(command, 3)
        if not directory.exists():
            make_run(directory, factor=1.02 if directory.name == "nvfp4" else 1.0)
        return subprocess.CompletedProcess(command, 0)

    failing = {"nvfp4"}
    monkeypatch.setattr(subprocess, "run", train)
    assert compare.main([f"to={tmp_path}"]) == 3
    assert "ended with status 3" in capsys.readouterr().err
    failing.clear()
    assert compare.main([f"to={tmp_path}"]) == 0
    assert trained == ["fp32", "nvfp4", "fp32", "nvfp4"]
    assert "+2.00%" in (tmp_path / "report" / "index.html").read_text()
    assert str(tmp_path / "report" / "gap.png") in capsys.readouterr().out
