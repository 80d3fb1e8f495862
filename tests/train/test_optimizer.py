"""Which optimizer a recipe gets, and what it may not say."""

from dataclasses import dataclass

import pytest
import torch

from train.optimizer import OptimizerConfig, open_optimizer, register_optimizer
from train.recipe.load import load_recipe
from train.recipe.reading import RecipeError


def test_the_default_is_adamw_with_the_keys_of_the_recipe() -> None:
    config = load_recipe("tiny", "optimizer.betas=[0.8,0.9]", "optimizer.eps=1e-7").optimizer
    optimizer = open_optimizer(config)
    made = optimizer.make([{"params": [torch.zeros(2, 2)]}])
    assert isinstance(made, torch.optim.AdamW)
    (group,) = made.param_groups
    assert (group["betas"], group["eps"], optimizer.weight_decay, optimizer.clip) == ((0.8, 0.9), 1e-7, 0.1, 1.0)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_room_is_what_the_first_step_makes(name: str) -> None:
    optimizer = open_optimizer(load_recipe("tiny", f"optimizer={name}").optimizer)
    master = torch.nn.Parameter(torch.randn(3, 4))
    made = optimizer.make([{"params": [master]}])
    master.grad = torch.randn(3, 4)
    made.step()
    room = optimizer.room(master)
    assert {key: (value.shape, value.dtype) for key, value in room.items()} == {
        key: (value.shape, value.dtype) for key, value in made.state[master].items()
    }
    assert all(key in made.param_groups[0] for key in optimizer.group_numbers)


def test_a_group_of_the_recipes_chooses_lion_whatever_the_recipe_says_inline() -> None:
    config = load_recipe("tiny", "optimizer=lion", "optimizer.learning_rate=5e-4", "optimizer.lion.fixed_decay=true").optimizer
    assert (config.name, config.betas, config.weight_decay, config.learning_rate) == ("lion", (0.9, 0.99), 0.5, 5e-4)
    (group,) = open_optimizer(config).make([{"params": [torch.zeros(2)]}]).param_groups
    assert (group["betas"], group["fixed_decay"]) == ((0.9, 0.99), True)
    assert load_recipe("tiny").optimizer.decay == config.decay


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.name=lio"], "optimizer.name='lio' is not available: use one of adamw, lion"),
        (["optimizer=lion", "optimizer.eps=1e-6"], "optimizer.eps=1e-06 has no meaning for optimizer.name=lion: leave it at 1e-08"),
        (["optimizer.lion.fixed_decay=true"], "optimizer.lion is set, but optimizer.name=adamw: use optimizer.name=lion"),
    ],
)
def test_what_would_be_ignored_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("tiny", *overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


@dataclass(frozen=True)
class Options:
    momentum: float = 0.9


def test_names_are_taken_once() -> None:
    for name in ("adamw", "clip"):
        with pytest.raises(ValueError, match=f"optimizer.name={name} is taken"):
            register_optimizer(
                name,
                make=lambda groups, config, options: torch.optim.SGD(groups, config.learning_rate, options.momentum),
                room=lambda master: {"momentum_buffer": torch.zeros_like(master)},
                options=Options,
            )
    assert OptimizerConfig(learning_rate=1e-3).name == "adamw"
