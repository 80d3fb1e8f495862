"""Gaps between the runs of a sweep, from runs whose gaps are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import nvfp4_gap
from experiments.nvfp4_gap import gaps, main, read_runs

STEPS = 200


def write(sweep: Path, arm: str, seed: int, factor: float, *, finished: bool = True) -> None:
    """A run whose losses are `factor` times those of fp32 with the same seed."""
    run = sweep / f"precision-{arm}__seed-{seed}"
    run.mkdir(parents=True)
    losses = [(5.0 / (1 + 0.05 * step) + 0.1 * seed) * factor for step in range(1, STEPS + 1)]
    lines = [json.dumps({"step": step, "loss/lm": loss}) for step, loss in enumerate(losses, start=1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if finished:
        (run / "finished.json").write_text(json.dumps({"step": STEPS, "eval/loss": losses[-1]}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed in (1, 2, 3):
        write(tmp_path, "fp32", seed, 1.0)
        write(tmp_path, "nvfp4", seed, 1.01 + 0.001 * seed)
        write(tmp_path, "nvfp4_no_sr", seed, 1.02 + 0.001 * seed)
    write(tmp_path, "bf16", 1, 1.001)
    write(tmp_path, "bf16", 2, 9.0, finished=False)
    return tmp_path


def test_gaps_are_of_pairs_with_the_same_seed(sweep: Path) -> None:
    found = gaps(read_runs(sweep))
    assert list(found) == ["bf16", "nvfp4", "nvfp4_no_sr"], "the smallest first"
    np.testing.assert_allclose(found["nvfp4"].final, [1.1, 1.2, 1.3], rtol=1e-9)
    np.testing.assert_allclose(found["nvfp4"].curves[2], 1.3, rtol=1e-9)
    assert found["nvfp4"].mean == pytest.approx(1.2) and found["nvfp4"].error == pytest.approx(0.1 / np.sqrt(3))
    assert found["bf16"].seeds == (1,) and np.isnan(found["bf16"].error), "seed 2 has not finished"


def test_what_a_technique_is_worth(sweep: Path) -> None:
    worth = gaps(read_runs(sweep), "nvfp4")
    np.testing.assert_allclose(
        worth["nvfp4_no_sr"].final, [100 * (1.02 + 0.001 * s) / (1.01 + 0.001 * s) - 100 for s in (1, 2, 3)], rtol=1e-9
    )


def test_the_page(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"runs={sweep}", f"to={tmp_path / 'report'}"]) == 0
    printed = capsys.readouterr().out
    assert "| nvfp4 | 3 | " in printed and "| +1.20 | 0.06 |" in printed
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["nvfp4"]["validation_gap_percent"] == pytest.approx([1.1, 1.2, 1.3]) and results["bf16"]["standard_error"] is None
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "nvfp4_no_sr" in page


def test_every_arm_of_the_recipe_is_in_a_picture() -> None:
    recipe = (Path(nvfp4_gap.__file__).parents[1] / "recipes" / "nvfp4_gap.yaml").read_text()
    arms = (
        next(line for line in recipe.splitlines() if line.strip().startswith("precision:") and "," in line).split(":")[1].strip().split(",")
    )
    drawn = {arm for _, panel in nvfp4_gap.PANELS for arm in panel}
    assert drawn == set(arms) - {"fp32"} and len(arms) == 12


@pytest.mark.parametrize(
    ("arguments", "words"), [(["runs=nowhere"], "holds no finished run of fp32"), (["rums=a"], "rums"), (["runs"], "runs")]
)
def test_what_is_wrong_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and len(error.strip().splitlines()) == 1


def test_runs_of_different_steps_are_not_compared(sweep: Path) -> None:
    metrics = sweep / "precision-nvfp4__seed-1" / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ValueError, match="nvfp4 and fp32 of seed 1 logged different steps"):
        gaps(read_runs(sweep))
