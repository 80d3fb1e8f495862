"""metrics.jsonl: exact, valid JSON, and one series through kills and resumes."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.observe.examples import metrics_of, run_info
from train.observe.metrics import FILE_NAME, MetricsFile, read_metrics


def test_metrics_lines_are_on_disk_at_once_and_exact(tmp_path: Path) -> None:
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path))
    for step in (1, 2, 3):
        observer.on_step(metrics_of(step, loss=0.1 + 0.2 * step))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before the file is closed
        assert json.loads(lines[-1]) == metrics_of(step, loss=0.1 + 0.2 * step)
        assert len(lines) == step
    observer.on_end({})


def test_evaluation_joins_the_line_of_its_step(tmp_path: Path) -> None:
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path))
    observer.on_evaluation({"step": 0, "tokens": 0, "eval/loss": 5.5})
    observer.on_step(metrics_of(1))
    observer.on_step(metrics_of(2))
    observer.on_evaluation({"step": 2, "tokens": 4096, "eval/loss": 2.25})
    observer.on_step(metrics_of(3))
    observer.on_end({})
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    assert entries[2] == {**metrics_of(2), "eval/loss": 2.25}
    assert entries[0]["eval/loss"] == 5.5 and "eval/loss" not in entries[3]


def test_resume_drops_later_steps_and_the_torn_line(tmp_path: Path) -> None:
    first = MetricsFile()
    first.on_start(run_info(tmp_path))
    for step in range(1, 8):
        first.on_step(metrics_of(step))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "loss/l')  # the writer was killed here
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, 8))
    second = MetricsFile()
    second.on_start(run_info(tmp_path, step=4))
    for step in range(5, 11):
        second.on_step(metrics_of(step))
    second.on_end({})
    assert read_metrics(tmp_path) == [metrics_of(step) for step in range(1, 11)]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_evaluation_repeated_after_a_resume_joins_the_kept_line(tmp_path: Path) -> None:
    first = MetricsFile()
    first.on_start(run_info(tmp_path))
    for step in (1, 2, 3):
        first.on_step(metrics_of(step))
    second = MetricsFile()
    second.on_start(run_info(tmp_path, step=2))
    second.on_evaluation({"step": 2, "tokens": 4096, "eval/loss": 1.5})
    second.on_end({})
    assert read_metrics(tmp_path) == [metrics_of(1), {**metrics_of(2), "eval/loss": 1.5}]


def test_a_new_run_does_not_continue_old_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss/lm": 1.0}\n')
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path, step=0))
    observer.on_step(metrics_of(1))
    observer.on_end({})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path))
    observer.on_step({"step": 1, "tokens": 1, "loss/lm": math.nan, "grad_norm": math.inf, "loss/total": -math.inf})
    observer.on_end({})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    (entry,) = read_metrics(tmp_path)
    assert math.isnan(entry["loss/lm"]) and entry["grad_norm"] == math.inf and entry["loss/total"] == -math.inf


@pytest.mark.parametrize("content", [b"garbage\n{}\n", b'{"loss/lm": 1.0}\n', b'{"step": 1}\n[2]\n'])
def test_a_damaged_metrics_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged \(line \d"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged \(line \d"):
        MetricsFile().on_start(run_info(tmp_path, step=1))


def test_killed_writer_leaves_a_file_that_can_be_continued(tmp_path: Path) -> None:
    script = (
        "import sys, itertools; from pathlib import Path; from train.observe.metrics import MetricsFile\n"
        "from train.observe import RunInfo\n"
        "o = MetricsFile(); o.on_start(RunInfo({}, Path(sys.argv[1]), 1, 1, 0, 10**9, 1))\n"
        "for s in itertools.count(1): o.on_step({'step': s, 'tokens': s, 'loss/lm': 1 / s})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size > 20_000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = read_metrics(tmp_path)
    assert [entry["step"] for entry in before] == list(range(1, len(before) + 1))
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path, step=100))
    observer.on_step(metrics_of(101))
    observer.on_end({})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, 102))


def test_a_full_disk_leaves_no_hole_and_no_damage(tmp_path: Path) -> None:
    """The real error in the middle of a line, and of an evaluation that joins one: a file that may not grow any further."""
    file = MetricsFile()
    file.on_start(run_info(tmp_path))
    for step in range(1, 5):
        file.on_step(metrics_of(step))
    path, before = tmp_path / FILE_NAME, resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))
    try:
        with pytest.raises(OSError):
            file.on_evaluation({"step": 4, "tokens": 4 * 2048, "eval/loss": 2.0})
        assert path.read_bytes() == whole
        for step in range(5, 8):
            with pytest.raises(OSError):
                file.on_step(metrics_of(step))
            assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.on_step(metrics_of(8))
    file.close()
    expected = [metrics_of(step) | ({"eval/loss": 2.0} if step == 4 else {}) for step in range(1, 9)]
    assert read_metrics(tmp_path) == expected


def test_a_rewind_drops_what_came_after(tmp_path: Path) -> None:
    file = MetricsFile()
    file.on_start(run_info(tmp_path))
    for step in range(1, 8):
        file.on_step(metrics_of(step))
    file.on_rewind(7, 4)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    file.on_evaluation({"step": 4, "tokens": 4 * 2048, "eval/loss": 2.0})
    file.on_step(metrics_of(5, loss=9.0))
    file.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[3]["eval/loss"] == 2.0 and rows[4]["loss/lm"] == 9.0
