"""The page of experiments.acceptance, from runs whose acceptance is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.domains import DOMAINS
from experiments.acceptance import CHANGES, Arm, differences, domain_rows, main, read_runs


def write(root: Path, arm: Arm, seed: int, share: float, *, finished: bool = True) -> None:
    """A run that ends with this acceptance of novels at depth 1; every further domain and the second depth have a hundredth less."""
    run = root / ("acceptance_heads-sweep" if arm.heads else "acceptance-sweep") / f"{arm}-{seed}"
    run.mkdir(parents=True)
    rows = []
    for step, factor in ((0, 0.5), (60, 0.8), (120, 1.0)):
        row: dict[str, float] = {"step": step, "tokens": 2048 * step, "eval/loss": 2.0 / factor}
        for place, domain in enumerate(DOMAINS):
            for depth in (1, 2):
                name, value = f"accept/{domain}/depth_{depth}", factor * (share - 0.01 * (place + depth - 1))
                row[f"accept/{domain}/length"] = 1 + value
                row |= {name: value, f"{name}_low": value - 0.02, f"{name}_high": value + 0.02}
        rows.append(row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "precision": {"default": arm.precision},
        "model": {"mtp_shared": arm.shared, "mtp_loss_scale": arm.scale},
        "train": {"only": "mtp" if arm.heads else None},
        "run": {"seed": seed},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if finished:
        (run / "finished.json").write_text(json.dumps({"step": 120}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, share in ((1, 0.60), (2, 0.70), (3, 0.65)):
        write(tmp_path, Arm(), seed, share)
        write(tmp_path, Arm(precision="fp32"), seed, share + 0.01 * seed)
        write(tmp_path, Arm(precision="fp32", scale=0.1), seed, share - 0.05)
    write(tmp_path, Arm(heads=True), 1, 0.72)
    write(tmp_path, Arm(shared=False), 1, 0.99, finished=False)
    return tmp_path


def test_pairs_differ_in_one_thing_alone(root: Path) -> None:
    runs, changes = read_runs(root), dict(CHANGES)
    assert Arm(shared=False) not in runs, "it is not finished"
    np.testing.assert_allclose(differences(runs, changes["fp32 instead of NVFP4"])[:, 0, 0], np.array([0.01, 0.02, 0.03]))
    np.testing.assert_allclose(
        np.sort(differences(runs, changes["loss scale 0.1 instead of 0.3"])[:, 3, 1]), np.array([-0.08, -0.07, -0.06])
    )
    np.testing.assert_allclose(differences(runs, changes["heads trained on alone"]), np.full((1, len(DOMAINS), 2), 0.12))
    assert len(differences(runs, changes["two blocks instead of one"])) == 0


def test_the_page(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "page"
    assert main(["train=false", f"runs={root}", f"to={to}"]) == 0
    assert {path.name for path in to.iterdir()} == {"results.json", "domains.png", "training.png", "arms.png", "index.html"}
    shown = capsys.readouterr().out
    assert "| novels | 65.0% (60.0% - 70.0%) | 64.0% (59.0% - 69.0%) | 1.64 |" in shown
    assert "| fp32 instead of NVFP4 | 3 | +2.0 ± 0.6 | +2.0 ± 0.6 |" in shown
    assert [row[0] for row in domain_rows(read_runs(root)[Arm()])] == list(DOMAINS)


def test_nothing_to_show_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train=false", f"runs={tmp_path}"]) == 2
    assert main(["train=maybe"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "no finished run" in errors[0] and "train=maybe" in errors[1]
