"""One rank against many: the same losses over 20 steps, the same weights behind them, and the same bits in every replica."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.layouts.cases import MATRIX, Case
from tests.layouts.compare import Comparison, Difference, furthest, furthest_tensor, gathered, relative
from tests.layouts.drawing import drawn
from tests.layouts.run import Held
from tests.layouts.sweep import go_on, read, table
from train.checkpoint.boxes import Box


@pytest.fixture(scope="module")
def comparison(_pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(_pool, tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{case.ranks}: {case.name}", marks=[] if case.usual else pytest.mark.slow) for case in MATRIX]
)
def test_a_layout_gives_the_numbers_of_one_rank(case: Case, comparison: Comparison) -> None:
    assert comparison(case, timeout=280).problems() == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_layouts_that_are_drawn_give_the_numbers_of_one_rank(comparison: Comparison) -> None:
    """LAYOUTS_SEED: of what is drawn, else another one every time; LAYOUTS_COUNT: how many."""
    seed, count = int(os.environ.get("LAYOUTS_SEED", secrets.randbelow(10**6))), int(os.environ.get("LAYOUTS_COUNT", "12"))
    print(f"LAYOUTS_SEED={seed}")
    for case in drawn(seed, count):
        assert comparison(case).problems() == [], f"{case.ranks} ranks, {case.name}, of LAYOUTS_SEED={seed}"


@pytest.mark.slow
def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    first, again, other = ([case.name for case in drawn(seed, 5)] for seed in (1, 1, 2))
    assert first == again != other


# -- it would notice


def test_differences_are_found() -> None:
    whole = [{"loss/lm": 2.0, "grad_norm": 1.0}, {"loss/lm": 1.0, "grad_norm": 0.5}]
    assert furthest(whole, whole, ("loss/",)) == 0
    assert furthest([whole[0], {"loss/lm": 1.5, "grad_norm": 0.5}], whole, ("loss/",)) == 0.5
    assert furthest(whole[:1], whole, ("loss/",)) == furthest([whole[0], {"grad_norm": 0.5}], whole, ("loss/",)) == float("inf")
    assert furthest(whole, whole, ("moe/",)) == relative(float("nan"), 1.0) == float("inf")

    ones = {"a": gathered([part("a", (2, 2), (0, 0), (2, 2), 1.0)])["a"]}
    half = gathered([part("a", (2, 2), (0, 0), (1, 2), 1.0)])
    other = gathered([part("a", (2, 2), (0, 0), (1, 2), 1.0), part("a", (2, 2), (1, 0), (1, 2), 1.5)])
    assert furthest_tensor(ones, ones) == 0 and furthest_tensor(other, ones) == 0.5
    assert furthest_tensor(half, ones) == furthest_tensor({}, ones) == float("inf")

    assert not Difference(2e-6, 2e-6, 2e-6, 1e-5, (), 0.6).problems()
    assert len(Difference(3e-6, float("nan"), 3e-6, 2e-5, ("a",), 0.1).problems()) == 6


def part(name: str, shape: tuple[int, ...], offset: tuple[int, ...], size: tuple[int, ...], value: float) -> Held:
    return Held(name, shape, Box(offset, size), np.full(size, value, np.float32))


def test_a_sweep_that_was_ended_goes_on(tmp_path: Path) -> None:
    measured: list[str] = []

    def measure(name: str) -> Callable[[], dict[str, Any]]:
        def now() -> dict[str, Any]:
            measured.append(name)
            return {"ranks": 2, "losses": 1e-7, "gradient_norm": 0.0, "moe": 0.0, "parameters": 0.0, "replicas": [], "problems": []}

        return now

    wanted = [(f"2: {name}", measure(name)) for name in ("a", "b | c")]
    assert len(go_on(tmp_path / "x.jsonl", "matrix", wanted, 1)) == 1
    lines = go_on(tmp_path / "x.jsonl", "matrix", wanted)
    assert measured == ["a", "b | c"] and lines == read(tmp_path / "x.jsonl", "matrix") and read(tmp_path / "x.jsonl", "random") == []
    assert table(lines).splitlines()[-1] == "| b \\| c | 2 | 1.0e-07 | 0.0e+00 | 0.0e+00 | 0.0e+00 | same bits |"
