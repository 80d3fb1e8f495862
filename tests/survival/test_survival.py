"""The sweep (`-m survival`), a few kills of it (`-m slow`), and that it would notice."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.survival.journey import LITTLE, Kind, Result, differences, leftovers, numbers, read_by_step
from tests.survival.moments import MOMENTS
from tests.survival.sweep import read, sweep, table


def failed(results: list[Result]) -> list[str]:
    return [
        f"journey {result.journey}, start {result.start}, {result.moment}: {'; '.join(result.problems)}"
        for result in results
        if result.problems
    ]


@pytest.mark.survival
@pytest.mark.timeout(24 * 3600)
def test_whatever_is_killed_whenever_the_run_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    """SURVIVAL_KILLS: how many; SURVIVAL_SEED: of what is drawn; SURVIVAL_TO: a directory in which a sweep that was ended goes on."""
    kills = int(os.environ.get("SURVIVAL_KILLS", "108"))
    results = sweep(Path(os.environ.get("SURVIVAL_TO", tmp_path)).absolute(), int(os.environ.get("SURVIVAL_SEED", "1")), kills)
    print(f"\n{table(results)}")
    assert not failed(results)
    missed = {moment.name for moment in MOMENTS} - {result.moment for result in results}
    assert kills < 100 or not missed, "no run was killed at these moments"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_kills_of_one_rank_and_of_two(tmp_path: Path) -> None:
    kinds = (Kind("1 rank", 1, "python", LITTLE), Kind("data 2", 2, "torchrun", (*LITTLE, "parallel.distributed_optimizer=true")))
    results = sweep(tmp_path, seed=3, kills=4, kinds=kinds, most=2)
    assert not failed(results) and [result.ranks for result in results] == [1, 1, 2, 2]
    assert all(result.identical and result.struck for result in results)
    assert read(tmp_path) == results and "4 of 4" in table(results)
    assert sweep(tmp_path, seed=3, kills=4, kinds=kinds, most=2) == results  # nothing is left to do


# -- it would notice


def metrics(*losses: float) -> list[dict[str, float]]:
    return [{"step": step, "loss/lm": loss, "grad_norm": float("nan")} for step, loss in enumerate(losses, start=1)]


def test_differences_are_found() -> None:
    whole = metrics(3.0, 2.0, 1.0)
    assert not differences(whole, whole, whole=True) and not differences(whole[:2], whole, whole=False)
    assert "loss/lm is 2.0000000000000004 instead of 2.0" in differences(metrics(3.0, 2.0000000000000004), whole, whole=False)[0]
    assert "has the steps [1, 2, 2, 3]" in differences([*whole[:2], *whole[1:]], whole, whole=True)[0]
    assert "2 lines instead of 3" in differences(whole[:2], whole, whole=True)[0]
    assert "has the steps [1, 3]" in differences([whole[0], whole[2]], whole, whole=False)[0]
    assert "grad_norm is None" in differences([{"step": 1, "loss/lm": 3.0}], whole[:1], whole=True)[0]
    assert not differences([{"step": 1, "loss/lm": 3.0}], whole[:1], whole=False)  # not evaluated yet


def test_of_a_step_that_was_taken_twice_the_last_reading_counts(tmp_path: Path) -> None:
    def note(rank: int, start: int, step: int, samples: list[int]) -> None:
        with (tmp_path / f"samples-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"start": start, "step": step, "samples": samples, "windows": []}) + "\n")

    for rank in (0, 1):
        note(rank, 0, 0, [rank])
        note(rank, 0, 1, [2 + rank])
    note(0, 1, 1, [8])  # rank 1 was killed before it read
    taken = read_by_step(tmp_path)
    assert taken == {(0, 0): [[[0], []]], (0, 1): [[[1], []]], (1, 0): [[[8], []]]}


def test_times_are_left_out_and_leftovers_found(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/lm": 2.0, "step_seconds": 1.0, "mfu": 0.1}\n{"step": 2, "lo')
    assert numbers(tmp_path) == [{"step": 1, "loss/lm": 2.0}]
    for name in ("lock", "recipe.yaml.partial", "checkpoints/step-00000002.partial/x", "metrics.jsonl.new", "recipe.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert leftovers(tmp_path) == ["checkpoints/step-00000002.partial", "lock", "metrics.jsonl.new", "recipe.yaml.partial"]


def test_the_table_counts_by_moment_and_ranks() -> None:
    one = Result(1, 0, "1 rank", 1, 0, MOMENTS[0].name, "rank", 0, {}, True, 0, 2, -9, 2, True)
    lines = table([one, replace(one, ranks=2, problems=["broken"])]).splitlines()
    assert lines[0] == "| killed | 1 rank | 2 ranks | of these identical |"
    assert lines[2] == f"| {MOMENTS[0].name} | 1 | 1 | 1 of 2 |" and lines[-1] == "| **all** | 1 | 1 | 1 of 2 |"
