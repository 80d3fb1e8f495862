"""The sweep of recall: what its arms have in common, which runs it makes, and what it says of results that are known."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import pytest

from experiments.retrieval import needles
from experiments.retrieval.__main__ import main
from experiments.retrieval.arms import ARMS, LENGTHS, TARGET, Arm, state_bytes
from experiments.retrieval.report import accuracy_rows, rate_rows, report
from experiments.retrieval.sweep import TASKS, Result, best, missing, read_results
from model.mixer import MIXERS
from train.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The layer of the attention arms is known in this module alone."""
    with patch.dict(MIXERS):
        yield


TWO = (Arm("mamba", "dense"), Arm("5to1", "moe"))


def result(arm: Arm, rate: float, seed: int, accuracy: float, *, loss: float = 1.0, stopped: bool = False) -> Result:
    return Result(arm.name, rate, seed, dict.fromkeys(TASKS, accuracy), loss, 100.0, stopped, 640)


def test_arms_have_as_many_active_parameters() -> None:
    assert len(ARMS) == 12
    assert all(abs(arm.counted.active - TARGET) < 0.001 * TARGET for arm in (Arm("attention", "dense"), Arm("8to1", "latent_moe"), *TWO))
    for arm in ARMS:
        mixers = arm.recipe().model.layers if arm in TWO else ""
        assert (mixers.count("M"), mixers.count("*")) in ((0, 0), (6, 0), (5, 1))


def test_state_is_what_a_cache_holds() -> None:
    """By formula: layers of keys and values of 64 features, of Mamba with a state of 64 x 32, and windows of three rows."""
    sizes = Arm("mamba", "dense").recipe().model
    assert sizes.size("mamba_heads") * sizes.size("mamba_head_dim") == 2 * sizes.size("mamba_state_size") == 64
    layer = 4 * (64 * 32 + 3 * (64 + 2 * 32))
    assert set(state_bytes(Arm("mamba", "dense")).values()) == {6 * layer}
    assert state_bytes(Arm("5to1", "dense")) == {n: 5 * layer + 4 * n * 2 * 64 for n in LENGTHS}
    assert state_bytes(Arm("attention", "dense")) == {n: 3 * (4 * 3 * 64 + 4 * n * 2 * 64) for n in LENGTHS}


def test_more_seeds_come_where_an_arm_is_best() -> None:
    mamba, hybrid = TWO
    assert list(missing([], TWO, (1e-3, 3e-3), 2)) == [(a.name, r, 1) for r in (1e-3, 3e-3) for a in TWO]
    results = [result(mamba, 1e-3, 1, 0.5), result(mamba, 3e-3, 1, 0.5, loss=0.9), result(hybrid, 1e-3, 1, 0.8)]
    assert list(missing(results, TWO, (1e-3, 3e-3), 2)) == [(hybrid.name, 3e-3, 1)]
    results.append(result(hybrid, 3e-3, 1, 0.0, stopped=True))
    assert best(results, mamba.name) == results[1] and best(results, hybrid.name) == results[2]
    assert list(missing(results, TWO, (1e-3, 3e-3), 3)) == [(a.name, r, s) for s in (2, 3) for a, r in ((mamba, 3e-3), (hybrid, 1e-3))]
    results.append(result(hybrid, 1e-3, 2, 0.6))
    assert accuracy_rows(results, TWO)[1] == ["5to1", "moe", "0.001", "2", *["0.800 (0.600)"] * 4]
    assert rate_rows(results, TWO, (1e-3, 3e-3))[1] == ["5to1", "moe", "0.800", "stopped"]


def test_the_page_has_tables_and_pictures(tmp_path: Path) -> None:
    text = report([result(TWO[0], 1e-3, 1, 0.25), result(TWO[0], 1e-3, 2, 0.5)], tmp_path)
    assert "| mamba | dense | 0.001 | 2 | 0.500 (0.250) |" in text
    assert all((tmp_path / name).stat().st_size > 200 for name in ("rates.png", "states.png", "index.html", "results.json"))


def test_wrong_arguments_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.jsonl").write_text("{}\n")
    for arguments, says in (
        (["arms=[mamba]"], "arms=mamba is none of attention-dense"),
        (["train=false", f"runs={tmp_path / 'none'}"], "holds no results"),
        (["train=false", f"runs={tmp_path}"], "has no result in line 1"),
        (["processes=0"], "leave nothing to do"),
        (["rates=[abc]"], "rates=['abc']: rates is a list of numbers"),
        (["rates=3e-3"], "rates is a list of numbers"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_command_makes_what_is_missing_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"runs={tmp_path}", "arms=[attention-dense]", "rates=[2e-3,1e-3]", "steps=8", "processes=1"]
    assert main([*arguments, "seeds=1"]) == 0
    assert len(read_results(tmp_path / "results.jsonl")) == 2
    assert main(arguments) == 0
    results = read_results(tmp_path / "results.jsonl")
    assert [result.seed for result in results] == [1, 1, 2] and len({result.loss for result in results}) == 3
    assert not list(tmp_path.glob("*/checkpoints"))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "1/1" not in capsys.readouterr().out


def needle_result(arm: str, seed: int, share: float) -> needles.Result:
    found = {f"{task}/{length}": share / times for task in ("niah_single_1", "niah_multikey_1") for times, length in ((1, 768), (2, 1536))}
    return needles.Result(arm, seed, 768, found, 0.5, 100.0, 2400)


def test_needles_have_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [needle_result("8to1", 1, 0.5), needle_result("5to1", 2, 0.75), needle_result("5to1", 1, 1.0)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    assert needles.main([f"runs={tmp_path}", "train=false", f"to={tmp_path / 'to'}"]) == 0
    printed = capsys.readouterr().out
    assert "| task | mixers | 768 | 1536 |" in printed
    assert "| `niah_single_1` | 5:1 | 1.00 (0.75) | 0.50 (0.38) |\n| `niah_single_1` | 8:1 | 0.50 | 0.25 |" in printed
    assert (tmp_path / "to" / "needles.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "to" / "needles.json").read_text())[0]["arm"] == "5to1"


def test_needles_of_other_proportions_differ_in_their_mixers_alone() -> None:
    recipes = {arm: load_recipe("needle", f"model.pattern={pattern}").model for arm, pattern in needles.ARMS.items()}
    counts = {arm: tuple(recipe.layers.count(kind) for kind in "M*-") for arm, recipe in recipes.items()}
    assert counts == {"5to1": (5, 1, 2), "8to1": (8, 1, 2), "mamba": (6, 0, 2)}
    assert recipes["5to1"] == load_recipe("needle").model


def test_wrong_arguments_of_needles_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.jsonl").write_text("{}\n")
    for arguments, says in (
        (["arms=[5to2]"], "names others than 5to1, 8to1, mamba"),
        (["arms=5to1"], "names others than 5to1, 8to1, mamba"),
        (["seeds=two"], "seeds=two: these are whole numbers"),
        (["steps=[]"], "steps=[]: these are whole numbers"),
        (["processes=0"], "processes=0 leave nothing to do"),
        ([f"runs={tmp_path}", "train=false"], "has no result in line 1"),
        ([f"runs={tmp_path / 'none'}", "train=false"], "holds no results"),
    ):
        assert needles.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and says in said and said.count("\n") == 1


def test_runs_of_other_lengths_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(asdict(needle_result("5to1", 1, 1.0))) + "\n")
    assert needles.main([f"runs={tmp_path}", "steps=2", "arms=[5to1]", "seeds=1"]) == 2
    assert "has runs of 2400 steps, and 2 are asked for" in capsys.readouterr().err
    (tmp_path / "results.jsonl").write_text(json.dumps(asdict(result(TWO[0], 1e-3, 1, 0.25))) + "\n")
    assert main([f"runs={tmp_path}", "steps=2", "arms=[mamba-dense]", "rates=[1e-3]", "seeds=1"]) == 2
    assert "has runs of 640 steps, and 2 are asked for" in capsys.readouterr().err
