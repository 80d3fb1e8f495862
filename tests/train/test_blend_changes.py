"""Another blend from the next step on: what a run reads, listed sample by sample, repeats and leaves out no window of any source."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.text_data import TextData
from tests.train.recipes import recipe
from train import loop
from train.recipe.reading import RecipeError

GIVEN = (
    "precision=fp32",
    "train.steps=16",
    "optimizer.warmup=1",
    "optimizer.decay=0",
    "data.validation_fraction=0.01",
    "checkpoint.every=2",
)
Listing = dict[int, tuple[str, int]]
"""sample -> source and window"""


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Three sources of 150 to 170 windows, so that a run of 128 samples stays within a pass of each."""
    paths = {name: tmp_path / f"{name}.txt" for name in "abc"}
    for place, (name, path) in enumerate(paths.items()):
        path.write_text("".join(f"{name} {i} " for i in range(1700 + 100 * place)))
    return paths


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Listing:
    """What runs read from now on; a sample that is read again must be the same."""
    listing: Listing = {}
    batch = TextData.batch

    def noting(data: TextData, samples: Any, step: int) -> Any:
        for index in samples:
            place, window = data.order(index)
            listing[index] = (data.sources[place].path, int(window))
        return batch(data, samples, step)

    monkeypatch.setattr(TextData, "batch", noting)
    return listing


def phases(*blends: tuple[int | None, dict[Path, float]]) -> str:
    written = []
    for tokens, blend in blends:
        sources = ",".join(f"{{path:'{path}',weight:{weight}}}" for path, weight in blend.items())
        written.append(f"{{tokens:{'null' if tokens is None else tokens},blend:[{sources}]}}")
    return f"data.phases=[{','.join(written)}]"


def by_source(listing: Listing) -> dict[str, list[int]]:
    """The windows of each source, in the order of the samples."""
    found: dict[str, list[int]] = {}
    for _, (path, window) in sorted(listing.items()):
        found.setdefault(Path(path).stem, []).append(window)
    return found


def train(run_dir: Path, *overrides: str) -> None:
    assert loop.run(recipe(*GIVEN, f"run.dir={run_dir}", f"data.cache={run_dir.parent / 'cache'}", *overrides)) == 0


def taken(listing: Listing) -> Listing:
    result = dict(listing)
    listing.clear()
    return result


@pytest.mark.slow
def test_another_blend_repeats_and_skips_no_window_of_a_source_that_stays(
    tmp_path: Path, texts: dict[str, Path], listed: Listing, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = texts.values()
    first = phases((None, {a: 0.5, b: 0.5}))
    train(tmp_path / "whole", first)
    whole = taken(listed)
    run_dir, allow = tmp_path / "run", "run.allow=[data.phases]"
    train(run_dir, first, "run.stop_after=5")
    before = dict(listed)
    assert before == {index: whole[index] for index in range(40)}

    second = phases((None, {b: 0.25, c: 0.75}))
    with pytest.raises(RecipeError, match=r"data.phases differ .* 40 samples .* run.allow=\[data.phases\]"):
        train(run_dir, second)
    train(run_dir, second, allow, "run.stop_after=7")
    assert "data.phases" in capsys.readouterr().out
    stored = (run_dir / "recipe.yaml").read_text()
    assert [phase["tokens"] for phase in yaml.safe_load(stored)["data"]["phases"]] == [40 * 64, None]
    train(run_dir, second, allow, "run.stop_after=9")  # the same command again adds nothing
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["data"] == yaml.safe_load(stored)["data"]
    third = phases((16 * 64, {a: 0.8, c: 0.2}), (None, {a: 1.0, b: 1.0, c: 1.0}))
    train(run_dir, third, allow)
    assert [phase["tokens"] for phase in yaml.safe_load((run_dir / "recipe.yaml").read_text())["data"]["phases"]] == [
        2560,
        2048,
        1024,
        None,
    ]
    history = [json.loads(line)["changes"] for line in (run_dir / "history.jsonl").read_text().splitlines()]
    assert ["data.phases" in changes for changes in history] == [True, False, True]

    assert sorted(listed) == list(range(128)) and {index: listed[index] for index in before} == before
    windows, alone = by_source(listed), by_source(whole)
    for name, read in windows.items():
        assert len(set(read)) == len(read), f"{name} repeats a window"
        if name in alone:  # the order of a source's windows does not depend on the blends it is in
            common = min(len(read), len(alone[name]))
            assert common > 20 and read[:common] == alone[name][:common]
    shares = {name: sum(Path(path).stem == name for index, (path, _) in listed.items() if 40 <= index < 72) for name in "abc"}
    assert shares["a"] == 0 and shares["b"] + shares["c"] == 32 and shares["c"] > shares["b"]
    # The phases written out, as the recipe now has them, are the same run.
    explicit = phases((2560, {a: 0.5, b: 0.5}), (2048, {b: 0.25, c: 0.75}), (1024, {a: 0.8, c: 0.2}), (None, {a: 1.0, b: 1.0, c: 1.0}))
    mixed = taken(listed)
    train(tmp_path / "explicit", explicit)
    assert listed == mixed
    metrics = [
        [json.loads(line)["loss/lm"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "explicit")
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_a_phase_that_is_added_leaves_the_others_alone(tmp_path: Path, texts: dict[str, Path], listed: Listing) -> None:
    a, b, c = texts.values()
    train(tmp_path / "run", phases((None, {a: 0.5, b: 0.5})), "run.stop_after=3")
    train(tmp_path / "run", phases((40 * 64, {a: 0.5, b: 0.5}), (None, {a: 0.3, c: 0.7})))  # begins behind what was read
    added = taken(listed)
    train(tmp_path / "whole", phases((None, {a: 0.5, b: 0.5})))
    assert all(added[index] == listed[index] for index in range(40))
    read, alone = by_source(added), by_source(listed)
    assert len(set(read["a"])) == len(read["a"]) > len(alone["a"][:20])
    common = min(len(read["a"]), len(alone["a"]))
    assert read["a"][:common] == alone["a"][:common]
    assert read["b"] == alone["b"][: len(read["b"])]
