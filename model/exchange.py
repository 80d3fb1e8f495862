"""Tokens to the ranks of their experts, and what those made of them back: by Megatron's all-to-all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from model.dispatch import Dispatcher, Once, Places, gather, spread


@dataclass(frozen=True)
class Visit:
    """What came to this rank's experts."""

    rows: Tensor
    """[rows, width], sorted by expert."""
    counts: list[int]
    """Rows of each expert of this rank."""
    weights: Tensor
    """fp32 [rows], with which each row's result counts."""
    back: Callable[[Tensor], Tensor]
    """[rows, any width], weighted -> [tokens, that width], summed up for each token of this rank, in the dtype that is given."""


class Exchange(Protocol):
    def __call__(self, tokens: Tensor, routing: Tensor, weights: Tensor) -> Visit:
        """tokens [tokens, width]; routing: bool [tokens, experts], top_k of each token; weights: fp32 of its shape."""


class AllToAll:
    """Once there and once back, a row for each expert that a token visits."""

    def __init__(self, experts: Sequence[int], config: TransformerConfig, groups: ProcessGroupCollection, once: Once) -> None:
        """experts: of this rank, consecutive; once: see `model.recompute.Recompute`."""
        self.dispatcher = Dispatcher(experts, config, groups, once)
        self.top_k: int = config.moe_router_topk

    def __call__(self, tokens: Tensor, routing: Tensor, weights: Tensor) -> Visit:
        dispatcher = self.dispatcher
        # Megatron's counts and order of rows; the rows themselves are made here, whose gradient is added in one order.
        _, sent_weights = dispatcher.dispatch_preprocess(tokens.new_empty(len(tokens), 1), routing, weights)
        places = Places.of(dispatcher.reversed_local_input_permutation_mapping, self.top_k)
        sent, sent_weights = dispatcher.token_dispatch(spread(tokens, places), sent_weights)
        rows, counts, row_weights = dispatcher.dispatch_postprocess(sent, sent_weights)

        def back(out: Tensor) -> Tensor:
            out = gather(dispatcher.token_combine(dispatcher.combine_preprocess(out)), places)
            # Which would else live until the layer's next microbatch, with all that made them.
            dispatcher.probs = dispatcher.routing_map = dispatcher.reversed_local_input_permutation_mapping = None  # type: ignore[assignment]
            return out

        return Visit(rows, counts.tolist(), row_weights, back)
