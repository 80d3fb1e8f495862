"""The promise of `make train`, kept from its first to its last step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train.observe.metrics import read_metrics


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_tiny_in_nvfp4_is_better_than_counting_trigrams(tmp_path: Path) -> None:
    run_dir, root = tmp_path / "tiny", Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "train", "-cn", "tiny", f"run.dir={run_dir}"], cwd=root, check=True)
    summary = json.loads((run_dir / "finished.json").read_text())
    assert summary["baseline/trigram"] == pytest.approx(1.90, abs=0.02) and summary["baseline/bigram"] == pytest.approx(2.44, abs=0.02)
    assert summary["eval/loss"] < 1.40
    metrics = read_metrics(run_dir)
    assert metrics[0]["loss/lm"] == pytest.approx(5.606, rel=0.03)  # ln 272
    assert all(m["precision/share/nvfp4"] > 0.2 for m in metrics if "loss/lm" in m)
    assert (run_dir / "report" / "loss.png").stat().st_size > 10_000
