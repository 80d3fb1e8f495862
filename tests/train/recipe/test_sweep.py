"""A sweep: a process and a run directory for every combination."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.recipes import SMALL


@pytest.mark.slow
def test_a_sweep_runs_every_job_in_a_directory_of_its_own_and_skips_finished_ones(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-W", "ignore", "-m", "train", "-cn", "tiny", "-m", *SMALL),
        *(
            "train.steps=2",
            "optimizer.warmup=1",
            "optimizer.decay=1",
            "train.global_batch_size=2",
            f"data.cache={tmp_path / 'cache'}",
        ),
        "run.seed=1,2",
    ]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def sweep(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    first = sweep()
    assert first.returncode == 0, first.stdout + first.stderr
    runs = sorted(path.parent for path in tmp_path.glob("runs/*/*/finished.json"))
    assert len(runs) == 2 and {yaml.safe_load((r / "recipe.yaml").read_text())["run"]["seed"] for r in runs} == {1, 2}
    assert [run.name for run in runs] == ["seed-1", "seed-2"]
    metrics = [(run / "metrics.jsonl").read_bytes() for run in runs]
    again = sweep()
    assert again.stdout.count("is finished, skipped") == 2 and "2 jobs, 2 finished, 0 failed" in again.stdout
    assert metrics == [(run / "metrics.jsonl").read_bytes() for run in runs]
    longer = sweep("train.steps=3")
    assert longer.returncode == 1 and "2 jobs, 0 finished, 2 failed" in longer.stdout
    assert longer.stderr.count("error: train.steps=3 instead of 2 would give step 2, one of the 2 done, the learning rate 0.004") == 2
