"""How many sequences a microbatch holds, where the recipe leaves it open: `train.micro_batch_size=auto`."""

# About what fits beside the weights of a small model anywhere: 16 sequences of 128 tokens, 8 of 256, one of 2048 or longer.
MOST_TOKENS = 2048


def automatic_micro_batch_size(global_batch_size: int, sequence_length: int, data_ranks: int, fewest: int = 1) -> int:
    """The largest number of sequences that divides what one of `data_ranks` gets of the global batch, holds at most MOST_TOKENS tokens, and makes
    at least `fewest` microbatches.

    One sequence where even that is longer, and where the global batch does not divide over the ranks, which validation refuses.
    """
    share, remainder = divmod(global_batch_size, data_ranks)
    if share < 1 or remainder:
        return 1
    most = max(1, min(share // fewest, MOST_TOKENS // sequence_length))
    return next(size for size in range(most, 0, -1) if share % size == 0)
