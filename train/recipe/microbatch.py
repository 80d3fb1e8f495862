"""How many sequences a microbatch holds, and which numbers `train.micro_batch_size=auto` chooses from."""

from collections.abc import Iterator

from parallel.misfit import Misfit
from train.recipe.tree import Recipe

# About what fits beside the weights of a small model anywhere: 16 sequences of 128 tokens, 8 of 256, one of 2048 or longer.
MOST_TOKENS = 2048


def check_micro_batch_size(recipe: Recipe, ranks: int, size: int) -> None:
    """Raises Misfit for microbatches of `size` sequences that a step on `ranks` ranks cannot be cut into."""
    train, data_ranks = recipe.train, recipe.parallel.data(ranks)
    share = train.global_batch_size // data_ranks
    if share % size:
        on_each = f" on each of {data_ranks} data-parallel ranks" if data_ranks > 1 else ""
        raise Misfit(
            f"train.micro_batch_size={size} does not divide the {share} sequences of a step{on_each} (train.global_batch_size="
            f"{train.global_batch_size})",
            "train.micro_batch_size",
            "train.global_batch_size",
            otherwise="use train.micro_batch_size=auto",
        )
    parallel, microbatches = recipe.parallel, share // size
    if microbatches < parallel.fewest_microbatches:
        raise Misfit(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs at least parallel.pipeline={parallel.pipeline} microbatches a step, "
            f"but train.micro_batch_size={size} makes {microbatches}",
            "train.micro_batch_size",
            "train.global_batch_size",
            "parallel.virtual_pipeline",
        )


def automatic_sizes(recipe: Recipe, ranks: int) -> Iterator[int]:
    """What auto may stand for, the largest first: sizes that pass the check above and hold at most MOST_TOKENS tokens, or one sequence where even
    that is longer."""
    train = recipe.train
    share = train.global_batch_size // recipe.parallel.data(ranks)
    for size in range(max(1, min(share, MOST_TOKENS // train.sequence_length)), 0, -1):
        try:
            check_micro_batch_size(recipe, ranks, size)
        except Misfit:
            continue
        yield size
