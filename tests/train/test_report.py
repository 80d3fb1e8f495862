"""Reports: the numbers behind the pictures, the page, the errors; and the comparison that ends in one."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from train.arguments import key_values
from train.report import __main__ as report
from train.report import compare
from train.report.curves import draw_losses
from train.report.drawing import spread
from train.report.report import draw_loss_curve, write_report
from train.report.series import Series, final, gap, load_run, smooth


def make_run(directory: Path, steps: int = 60, factor: float = 1.0, recipe: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A synthetic run: losses fall from ln(256), an evaluation every 20 steps."""
    directory.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        loss = factor * (1.3 + 4.2 * math.exp(-step / 8) + 0.02 * math.sin(step))
        entry: dict[str, Any] = {
            "step": step,
            "tokens": 2048 * step,
            "loss/lm": loss,
            "loss/mtp_1": loss + 0.3,
            "loss/mtp_2": loss + 0.6,
            "grad_norm": 1.0 / step,
            "learning_rate": 4e-3 * min(1.0, step / 10),
            "tokens_per_second": 9000.0 + step,
            "precision/share/nvfp4": 0.6,
            "precision/share/bf16": 0.4,
        }
        if step % 20 == 0:
            entry["eval/loss"] = loss + 0.05
        lines.append(json.dumps({**entry, **changes}))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if recipe is not None:
        (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return directory


# --- numbers


def test_smooth_keeps_a_constant_and_a_slope_inside() -> None:
    assert np.allclose(smooth(np.full(9, 2.5), 5), 2.5)
    slope = np.arange(20.0)
    smoothed = smooth(slope, 5)
    assert np.allclose(smoothed[:-2], slope[:-2])  # symmetric windows, shrinking at the beginning
    assert smoothed[-1] == np.mean([17.0, 18.0, 19.0])
    assert smooth(np.array([7.0]), 5).tolist() == [7.0]


def test_gap_uses_common_finite_steps_only() -> None:
    reference = Series("a", [{"step": s, "loss/lm": 2.0} for s in (1, 2, 3, 4, 5)])
    values = {2: 2.1, 4: 1.9, 5: math.nan, 8: 1.0}
    run = Series("b", [{"step": s, "loss/lm": value} for s, value in values.items()])
    steps, percent = gap(run, reference)
    assert steps.tolist() == [2, 4]
    assert np.allclose(percent, [5.0, -5.0])


def test_final_is_the_mean_of_the_last_tenth() -> None:
    assert final(np.arange(100.0)) == np.mean(np.arange(90, 100))
    assert final(np.array([3.0, 1.0])) == 1.0


@pytest.mark.parametrize("places", [[0.5], [0.0, 0.0, 0.0], [0.1, 0.5, 0.505, 0.51, 0.9], [0.97, 0.98, 1.0, 1.0], [0.3] * 6])
def test_labels_keep_their_distance_order_and_frame(places: list[float]) -> None:
    moved = spread(places, 0.06)
    assert all(after - before >= 0.06 - 1e-9 for before, after in itertools.pairwise(moved))
    assert moved[0] >= 0.0 and moved[-1] <= 1.0 + 1e-9
    if len(places) == 1:
        assert moved == places


# --- pictures and the page


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_loss_curve_of_a_run(tmp_path: Path) -> None:
    path = draw_loss_curve(make_run(tmp_path / "a"))
    assert path == tmp_path / "a" / "report" / "loss.png"
    width, height = png_size(path)
    assert width >= 1000 and height >= 500


def test_loss_curve_of_a_single_step(tmp_path: Path) -> None:
    assert png_size(draw_loss_curve(make_run(tmp_path / "a", steps=1)))[0] >= 1000


def test_report_of_three_runs_is_one_self_contained_page(tmp_path: Path) -> None:
    base = {"run": {"seed": 1, "dir": "a"}, "precision": {"default": "nvfp4"}, "hub": {"token": "abc"}}
    runs = [
        make_run(tmp_path / "fp32", recipe={**base, "precision": {"default": "fp32"}}),
        make_run(tmp_path / "nvfp4", factor=1.01, recipe=base),
        make_run(tmp_path / "<short>", steps=20, recipe=base),
    ]
    (runs[0] / "report").mkdir()
    (runs[0] / "report" / "facts.json").write_text('{"parameters": 1234567, "baseline/trigram": 1.9102}')
    page = write_report(runs, tmp_path / "out")
    text = page.read_text()
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"loss.png", "gap.png", "precision.png", "grad_norm.png", "learning_rate.png", "speed.png"}
    assert text.count("data:image/png;base64,") == 6
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|https?://|<script|@import""", text)
    rest = re.sub(r'base64,[^"]+', "", text)
    assert "+1.00%" in rest and "reference" in rest and "1,234,567" in rest and "1.9102" in rest
    assert "&lt;short&gt;" in rest and "<short>" not in rest
    assert "precision.default" in rest and "run.seed" not in rest  # only what differs
    assert "abc" not in rest
    last = np.mean([float(json.loads(line)["loss/lm"]) for line in (runs[1] / "metrics.jsonl").open()][-6:])
    assert f"{last:.4f}" in rest


def test_report_says_what_was_not_logged(tmp_path: Path) -> None:
    run = tmp_path / "a"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/lm": 2.0}\n{"step": 2, "loss/lm": "NaN"}\n')
    page = write_report([run], tmp_path / "out")
    text = page.read_text()
    assert "no run logged a usable grad_norm" in text and "no run logged precision/share" in text
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"loss.png"}


def test_report_of_six_runs_with_a_format_switch(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run_with_a_long_name_{index}", factor=1 + index / 100) for index in range(6)]
    lines = [json.loads(line) for line in (runs[3] / "metrics.jsonl").open()]
    for entry in lines[40:]:
        entry |= {"precision/share/nvfp4": 0.0, "precision/share/bf16": 1.0}
    (runs[3] / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    write_report(runs, tmp_path / "out")
    assert png_size(tmp_path / "out" / "precision.png")[1] > 1000  # a panel per run


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "x" / "seed"), make_run(tmp_path / "y" / "seed")], tmp_path / "out")
    assert "x/seed" in page.read_text() and "y/seed" in page.read_text()


def test_no_finite_loss_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a: no finite loss/lm was logged"):
        draw_losses([Series("a", [{"step": 1, "loss/lm": math.nan}])], tmp_path / "x.png")


# --- the commands


def test_command_writes_below_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert report.main([f"runs=[{first},{second}]"]) == 0
    assert (first / "report" / "index.html").is_file()
    assert str(first / "report" / "gap.png") in capsys.readouterr().out
    assert report.main([f"runs={first}", f"to={tmp_path / 'one'}"]) == 0
    assert not (tmp_path / "one" / "gap.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"runs=\[\] names no run"),
        (["runs=[{tmp}/none]"], r"none/metrics\.jsonl does not exist"),
        (["runs=[{tmp}/empty]"], r"empty/metrics\.jsonl is empty"),
        (["runs=[{tmp}/good,{tmp}/good]"], "twice"),
        (["runs=[1,2,3,4,5,6,7]"], "at most 6"),
        (["run=[a]"], "'run=\\[a\\]' is unknown here: the keys are runs, to"),
        (["runs=[a"], "is not understood"),
        (["runs=a,b"], "write a list as runs=\\[a,b\\]"),
        (["+runs=a"], "is unknown here"),
        (["runs={{a:1}}"], "neither a value nor a list"),
        (["runs=[{tmp}/broken]"], "is not YAML"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    make_run(tmp_path / "good")
    make_run(tmp_path / "broken")
    (tmp_path / "broken" / "recipe.yaml").write_text("a: [")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert report.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and error.count("\n") == 1


def test_key_values_read_hydra_syntax() -> None:
    assert key_values(["runs=[a/b,c]", "to='x y'"], ("runs", "to")) == {"runs": ["a/b", "c"], "to": "x y"}


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


def test_load_run_reads_the_baseline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert load_run(run).baseline is None
    (run / "report").mkdir()
    (run / "report" / "facts.json").write_text('{"baseline/trigram": 1.5}')
    assert load_run(run).baseline == 1.5
