"""Megatron's contract with a model, around one of ours.

Megatron's schedules, DDP and optimizers ask a model chunk for attributes and methods of certain names. They are here, and nowhere else:

    set_input_tensor                               the schedules hand over what the stage before sent
    config, model_type, pre_process, post_process  what they and DDP look for
    share_embeddings_and_output_weights,           set where the first and the last stage hold copies of one weight: Megatron then sums the
    shared_embedding_or_output_weight              gradients of both

and of a parameter

    allreduce                                      False: an expert, whose gradients are reduced over the expert-data-parallel ranks
    sequence_parallel                              its gradients are summed over the tensor group
    tensor_model_parallel, partition_*             split over the tensor group: its norm is summed over it
    shared_embedding, shared                       one of two copies; the one whose norm the first stage already counts
"""

from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parallel.layout import Layout
from parallel.shards import Spread, spread_of
from parallel.stage import Stage


def mark(param: nn.Parameter, spread: Spread, layout: Layout) -> None:
    """Tells Megatron over which ranks the parameter is spread."""
    if spread in ("expert_rows", "expert_columns"):
        # Whenever expert and dense modules are not replicated alike (tensor 2, expert 1, expert tensor 1, say) this must be False; 0.16.1
        # itself only looks at expert > 1, and replicas drift apart.
        param.allreduce = layout.expert_size == 1 and layout.expert_tensor_size == layout.tensor_size  # type: ignore[attr-defined]
    if spread == "everywhere":
        # With sequence parallelism every rank sees other tokens.
        param.sequence_parallel = layout.sequence_parallel  # type: ignore[attr-defined]
    else:
        param.tensor_model_parallel = True  # type: ignore[attr-defined]
        param.partition_dim = {"rows": 0, "columns": 1, "expert_rows": 1, "expert_columns": 2}[spread]  # type: ignore[attr-defined]
        param.partition_stride = 1  # type: ignore[attr-defined]


class MegatronStage(nn.Module):
    """A model chunk as Megatron wants it: forward takes the microbatch alone."""

    def __init__(self, stage: Stage, config: TransformerConfig, layout: Layout):
        super().__init__()
        self.stage = stage
        self.config = config
        self.model_type = ModelType.encoder_or_decoder  # one input, one output a stage
        self.pre_process, self.post_process = stage.is_first, stage.is_last
        weight = stage.shared_weight
        self.share_embeddings_and_output_weights = weight is not None
        if weight is not None:
            weight.shared_embedding = True  # type: ignore[attr-defined]
            if not stage.is_first:
                weight.shared = True  # type: ignore[attr-defined]
        for param in stage.parameters():
            if (spread := spread_of(param)) is not None:
                mark(param, spread, layout)
        self._input: Tensor | None = None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """[sequence, batch, hidden] of the stage before, or None."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """What is duplicated on the first and the last stage."""
        return self.stage.shared_weight

    def forward(self, microbatch: Any) -> Tensor:
        return self.stage(microbatch, self._input)
