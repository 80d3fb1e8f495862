"""Pictures, the page, and the command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.train.report.runs import make_run, png_size
from train.arguments import key_values
from train.report import __main__ as report
from train.report.curves import draw_losses
from train.report.report import draw_loss_curve, write_report
from train.report.series import Series


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
    assert names == {
        "loss.png",
        "gap.png",
        "mtp.png",
        "precision.png",
        "grad_norm.png",
        "learning_rate.png",
        "speed.png",
        "mfu.png",
        "phases.png",
    }
    assert text.count("data:image/png;base64,") == 9
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|https?://|<script|@import""", text)
    rest = re.sub(r'base64,[^"]+', "", text)
    assert (
        "+1.00%" in rest
        and "reference" in rest
        and "1,234,567" in rest
        and f"1.9102 ({1.9102 / math.log(2):.4f} bits)" in rest
        and "17.0%" in rest
    )
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
