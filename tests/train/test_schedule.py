"""The learning rate, durations, and the reading of recipes: pure functions."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import pytest

from train.duration import Duration
from train.optimizer import OptimizerConfig, learning_rate
from train.recipe.load import load_recipe
from train.recipe.reading import RecipeError, defaults, plain, read
from train.recipe.tree import Recipe


def rates(style: Literal["minus_sqrt", "linear", "cosine"], steps: int = 20) -> list[float]:
    warmup, decay = Duration(4, "steps"), Duration(800, "tokens")
    config = OptimizerConfig(1.0, min_learning_rate=0.1, warmup=warmup, decay=decay, decay_style=style)
    return [learning_rate(config, step, steps, tokens_per_step=100) for step in range(steps)]


@pytest.mark.parametrize(
    ("style", "halfway"), [("minus_sqrt", 1 - math.sqrt(0.5)), ("linear", 0.5), ("cosine", (1 + math.cos(math.pi / 2)) / 2)]
)
def test_warmup_constant_decay(style: Literal["minus_sqrt", "linear", "cosine"], halfway: float) -> None:
    values = rates(style)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:12] == [1.0] * 8
    assert values[15] == pytest.approx(0.1 + 0.9 * halfway)  # 4 of 8 decay steps done
    assert values[19] == pytest.approx(0.1)
    assert values[12:] == sorted(values[12:], reverse=True)


def test_without_warmup_and_decay_it_is_constant() -> None:
    assert {learning_rate(OptimizerConfig(0.5), step, 10, 1) for step in range(10)} == {0.5}


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        (30, 30, "steps"),
        ("30steps", 30, "steps"),
        ("1 step", 1, "steps"),
        ("200B tokens", 200 * 10**9, "tokens"),
        ("2.5k tokens", 2500, "tokens"),
        ("54%", 54, "%"),
        ("4.17 %", Fraction(417, 100), "%"),
    ],
)
def test_durations_are_read(text: object, count: int, unit: str) -> None:
    duration = Duration.read(text)
    assert (duration.count, duration.unit) == (count, unit)
    assert Duration.read(plain(duration)) == duration


@pytest.mark.parametrize("text", ["", "12", "steps", "1.5 steps", "-3 steps", -3, 1.5, True, "3 weeks", "%", "2k%", "100.1%", "-4%"])
def test_other_durations_are_refused(text: object) -> None:
    with pytest.raises(ValueError):
        Duration.read(text)


def test_decimal_numbers_are_whole_numbers_of_tokens() -> None:
    for scale, unit in (("k", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12)):
        for hundredths in range(1, 1000):
            duration = Duration.read(f"{hundredths // 100}.{hundredths % 100:02d}{scale} tokens")
            assert duration.count == hundredths * unit // 100
            assert Duration.read(str(duration)) == duration


def test_tokens_become_steps_rounded_up() -> None:
    assert Duration(201, "tokens").steps(100, 480) == 3
    assert Duration(7, "steps").steps(100, 480) == 7


def test_shares_become_steps_rounded_down_and_never_exceed_the_run() -> None:
    assert [Duration.read(text).steps(100, 480) for text in ("4.2%", "54.2%", "50%", "100%", "0%")] == [20, 260, 240, 480, 0]
    assert Duration.read("29%").steps(1, 100) == 29  # 0.29 * 100 is 28.999999999999996 in binary
    for total in range(1, 300):
        for first in range(0, 101, 7):
            parts = (Duration.read(f"{first}%"), Duration.read(f"{100 - first}%"))
            assert total - 1 <= sum(part.steps(1, total) for part in parts) <= total


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "decay"), [("tiny", 480, 20, 260), ("small", 2000, 100, 400), ("nvfp4_gap", 300, 20, 60)]
)
def test_shipped_recipes_scale_to_any_length(name: str, steps: int, warmup: int, decay: int) -> None:
    recipe = load_recipe(name)
    assert recipe.total_steps == steps
    assert (recipe.in_steps(recipe.optimizer.warmup), recipe.in_steps(recipe.optimizer.decay)) == (warmup, decay)
    for length in (1, 2, 3, 10, 200, 7777):
        scaled = load_recipe(name, f"train.steps={length}")
        assert 0 <= scaled.save_every <= length and scaled.last_step == length


def test_where_a_run_is_saved_and_stopped() -> None:
    recipe = load_recipe("tiny", "checkpoint.every=10%", "run.stop_after=25%")
    assert (recipe.save_every, recipe.last_step) == (48, 120)
    recipe = load_recipe("tiny", "train.steps=5", "checkpoint.every=1%", "run.stop_after=1%")
    assert (recipe.save_every, recipe.last_step) == (1, 1)


def test_a_schedule_takes_shares_exactly() -> None:
    for start in ("0.82", "82%"):
        recipe = load_recipe("tiny", f"precision.schedule=[{{format: bf16, modules: [layers.0.*], start: {start}}}]")
        assert recipe.policy.times == [0.0, 0.82]


@dataclass(frozen=True)
class Inner:
    size: int = 3
    kind: Literal["a", "b"] = "a"
    ratio: float = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    flag: bool = False
    maybe: int | None = None


def test_reading_is_the_inverse_of_plain() -> None:
    value = Outer(Inner(5, "b", 1.0, ("x", "y")), True, 2)
    assert read(Outer, plain(value)) == value
    assert read(Outer, {"inner": {"ratio": 1}}).inner.ratio == 1.0
    assert defaults(Outer) == {"inner": {"size": 3, "kind": "a", "ratio": 0.5, "names": []}, "flag": False, "maybe": None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"size": "3"}}, "inner.size='3' must be a whole number"),
        ({"inner": {"size": True}}, "inner.size=True must be a whole number"),
        ({"inner": {"kind": "c"}}, "inner.kind='c' is unknown: use a or b"),
        ({"inner": {"names": "x"}}, "inner.names='x' must be a list"),
        ({"inner": {"names": [1]}}, "inner.names[0]=1 must be a text"),
        ({"inner": {}, "flag": 1}, "flag=1 must be true or false"),
        ({"inner": 3}, "inner=3 must be a group of keys"),
        ({}, "inner is missing"),
        ({"inner": {"sise": 3}}, "inner.sise is no key of a recipe (inner.sise=3): did you mean inner.size?"),
    ],
)
def test_wrong_values_name_key_and_remedy(values: dict, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        read(Outer, values)
    assert message in str(error.value)


def test_every_key_of_a_recipe_has_a_default_or_is_required() -> None:
    tree = defaults(Recipe)
    assert tree["precision"]["default"] == "nvfp4" and "learning_rate" not in tree["optimizer"]
