"""train.micro_batch_size=auto."""

import pytest

from train.recipe.load import load_recipe
from train.recipe.microbatch import MOST_TOKENS, automatic_micro_batch_size
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
        (16, 128, 3, 1),
    ],
)
def test_largest_divisor_within_the_bound(batch: int, length: int, ranks: int, size: int) -> None:
    assert automatic_micro_batch_size(batch, length, ranks) == size


def test_the_size_always_divides_and_no_larger_one_would() -> None:
    for batch in range(1, 40):
        for ranks in (r for r in range(1, batch + 1) if batch % r == 0):
            share, most = batch // ranks, MOST_TOKENS // 300
            sizes = [size for size in range(1, share + 1) if share % size == 0 and size <= most]
            assert automatic_micro_batch_size(batch, 300, ranks) == max(sizes)


def test_a_virtual_pipeline_needs_a_microbatch_for_each_stage() -> None:
    assert automatic_micro_batch_size(16, 128, 1, fewest=4) == 4
    layout = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    assert load_recipe("tiny", *layout, world_size=2).micro_batch_size == 8
    with pytest.raises(
        RecipeError, match=r"parallel.virtual_pipeline=2 needs at least parallel.pipeline=2 microbatches .* makes 1: lower it"
    ):
        load_recipe("tiny", *layout, "train.micro_batch_size=16", world_size=2)


def test_recipes_keep_their_microbatches() -> None:
    assert [load_recipe(name).micro_batch_size for name in ("tiny", "small", "nvfp4_gap")] == [16, 8, 16]
    assert load_recipe("tiny", "parallel.tensor=2", "parallel.expert=2", world_size=4).micro_batch_size == 8


def test_sizes_that_do_not_fit_offer_a_smaller_microbatch() -> None:
    with pytest.raises(
        RecipeError, match=r"train.micro_batch_size=16 does not divide the 8 sequences .* each of 2 data-parallel.*: use 8, or auto"
    ):
        load_recipe("tiny", "train.micro_batch_size=16", world_size=2)
    with pytest.raises(
        RecipeError, match=r"train.global_batch_size=16 is not a multiple of the 3 data-parallel ranks.*: use for instance 15"
    ):
        load_recipe("tiny", world_size=3)
