"""train.micro_batch_size=auto."""

from dataclasses import replace

import pytest

from train.recipe.load import load_recipe
from train.recipe.microbatch import MOST_TOKENS, automatic_sizes
from train.recipe.reading import RecipeError


@pytest.mark.parametrize(
    ("batch", "length", "ranks", "size"),
    [
        (16, 128, 1, 16),
        (32, 256, 1, 8),
        (16, 128, 2, 8),
        (24, 128, 1, 12),
        (14, 256, 1, 7),
        (13, 256, 1, 1),
        (3072, 8192, 64, 1),
    ],
)
def test_largest_divisor_within_the_bound(batch: int, length: int, ranks: int, size: int) -> None:
    given = (f"train.global_batch_size={batch}", f"train.sequence_length={length}")
    assert load_recipe("tiny", *given, world_size=ranks).micro_batch_size == size


def test_the_sizes_always_divide_and_none_is_left_out() -> None:
    tiny = load_recipe("tiny")
    for batch in range(1, 40):
        recipe = replace(tiny, train=replace(tiny.train, global_batch_size=batch, sequence_length=300, micro_batch_size="auto"))
        for ranks in (r for r in range(1, batch + 1) if batch % r == 0):
            share, most = batch // ranks, MOST_TOKENS // 300
            expected = [size for size in range(share, 0, -1) if share % size == 0 and size <= most]
            assert list(automatic_sizes(recipe, ranks)) == expected


def test_the_size_is_one_that_the_formats_can_run() -> None:
    """In NVFP4 the rotation of a wgrad takes 16 tokens at a time: 85 sequences of 24 are no multiple of that, 34 are."""
    given = ("train.global_batch_size=170", "train.sequence_length=24")
    assert load_recipe("tiny", *given, "precision=fp32").micro_batch_size == 85
    assert load_recipe("tiny", *given).micro_batch_size == 34
    with pytest.raises(RecipeError, match=r"with train.micro_batch_size=3 and train.sequence_length=24, precision asks for nvfp4"):
        load_recipe("tiny", "train.global_batch_size=3", "train.sequence_length=24")


def test_a_virtual_pipeline_needs_a_microbatch_for_each_stage() -> None:
    layout = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    assert load_recipe("tiny", *layout, world_size=2).micro_batch_size == 8
    with pytest.raises(RecipeError, match=r"parallel.virtual_pipeline=2 needs at least parallel.pipeline=2 microbatches .* makes 1: use"):
        load_recipe("tiny", *layout, "train.micro_batch_size=16", world_size=2)


def test_recipes_keep_their_microbatches() -> None:
    assert [load_recipe(name).micro_batch_size for name in ("tiny", "small", "nvfp4_gap")] == [16, 8, 16]
    assert load_recipe("tiny", "parallel.tensor=2", "parallel.expert=2", world_size=4).micro_batch_size == 8
