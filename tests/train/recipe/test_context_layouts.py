"""Layouts that split sequences in ways a model cannot have are refused in one sentence: the key, the value, what would work."""

import pytest

from train.recipe.load import load_recipe
from train.recipe.reading import RecipeError

CONTEXT = ("parallel.context=2", "precision=fp32")
HEADS = ("parallel.context_mamba=all_to_all", "precision=fp32")


@pytest.mark.parametrize(
    ("world", "overrides", "sentence"),
    [
        (
            2,
            (*CONTEXT, "train.sequence_length=129"),
            "train.sequence_length=129 is not a multiple of parallel.context=2, which splits sequences: use train.sequence_length=128 or 130, or "
            "change the layout",
        ),
        (
            8,
            ("precision=fp32", "parallel.context=4", "parallel.tensor=2", "train.sequence_length=20"),
            "train.sequence_length=20 is not a multiple of parallel.context=4 x parallel.tensor=2 = 8, which split sequences: use "
            "train.sequence_length=16 or 24, or change the layout",
        ),
        (
            64,
            (*HEADS, "parallel.context=64", "train.sequence_length=256"),
            "parallel.context=64 with parallel.context_mamba=all_to_all does not share out model.mamba_heads=32 and model.mamba_groups=2: use "
            "parallel.context=32, or parallel.context_mamba=state",
        ),
        (
            6,
            (*HEADS, "parallel.context=3", "parallel.tensor=2", "train.sequence_length=120"),
            "parallel.context=3 with parallel.context_mamba=all_to_all does not share out model.mamba_heads=32 and model.mamba_groups=2 / "
            "parallel.tensor=2: use parallel.context=2 or 4, or parallel.context_mamba=state",
        ),
        (
            64,
            ("precision=fp32", "parallel.context=64"),
            "parallel.context=64 leaves a rank 2 of train.sequence_length=128 tokens, but Mamba-2 layers need 3: use parallel.context=32 or less",
        ),
        (
            6,
            ("precision=fp32", "parallel.context=2", "parallel.tensor=2"),
            "parallel.tensor=2 x parallel.pipeline=1 x parallel.context=2 = 4 does not divide the 6 ranks of this run: start a multiple of 4 ranks "
            "or lower one of them",
        ),
    ],
)
def test_impossible_splits_are_one_sentence(world: int, overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe("tiny", *overrides, world_size=world)
    assert str(refused.value) == sentence
