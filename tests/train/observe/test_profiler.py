"""The profiler: a window of a real run, nothing outside it, and the same numbers with it as without."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.train.observe.examples import run_info
from tests.train.recipes import recipe
from train import loop
from train.observe.base import ProfileConfig
from train.observe.metrics import read_metrics
from train.observe.profiler import Profiler
from train.recipe.reading import RecipeError

LENGTH = ("train.steps=4", "optimizer.warmup=1", "optimizer.decay=1", "train.global_batch_size=2")


def test_a_window_of_a_run_is_traced_and_changes_nothing(tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert loop.run(recipe(*LENGTH, f"run.dir={plain}")) == 0
    assert loop.run(recipe(*LENGTH, f"run.dir={watched}", "monitor.profile={start: 2, steps: 1}")) == 0
    assert [entry["loss/lm"] for entry in read_metrics(plain)] == [entry["loss/lm"] for entry in read_metrics(watched)]
    assert not (plain / "profile").exists()
    assert {path.name for path in (watched / "profile").iterdir()} == {"steps-2-2.json.gz", "steps-2-2.txt"}
    events = json.loads(gzip.decompress((watched / "profile" / "steps-2-2.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 1
    assert "aten::" in (watched / "profile" / "steps-2-2.txt").read_text()
    assert "Profile of steps 2 to 2" in (watched / "log.txt").read_text()


def trace(observer: Profiler, steps: range) -> None:
    for step in steps:
        observer.on_step_begin(step)
        torch.ones(8).mul_(step)


def test_only_the_steps_of_the_window_are_in_it(tmp_path: Path) -> None:
    said: list[str] = []
    observer = Profiler(ProfileConfig(start=3, steps=2), said.append)
    observer.on_start(run_info(tmp_path))
    trace(observer, range(1, 8))
    observer.close()
    events = json.loads(gzip.decompress((tmp_path / "profile" / "steps-3-4.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mul_" for event in events) == 2
    assert len(said) == 1


@pytest.mark.parametrize(("first", "last", "name"), [(4, 5, "steps-4-5"), (2, 3, "steps-3-3")])
def test_a_run_that_begins_or_fails_within_the_window_keeps_what_was_traced(tmp_path: Path, first: int, last: int, name: str) -> None:
    observer = Profiler(ProfileConfig(start=3, steps=3), lambda line: None)
    observer.on_start(run_info(tmp_path, step=first - 1))
    trace(observer, range(first, last + 1))
    observer.close()
    observer.close()
    assert (tmp_path / "profile" / f"{name}.json.gz").is_file()


@pytest.mark.parametrize(
    ("window", "sentence"),
    [("{start: 0, steps: 1}", "start=0 must be"), ("{steps: -1}", "steps=-1 is"), ("{start: 9, steps: 1}", "start=9 lies")],
)
def test_impossible_windows_are_refused(window: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=rf"monitor\.profile\.{sentence}"):
        recipe(*LENGTH, f"monitor.profile={window}")
