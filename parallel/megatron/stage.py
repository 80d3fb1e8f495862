"""Megatron's contract with a model, around one of ours.

Megatron's schedules, DDP and optimizers ask a model chunk for attributes and methods of certain names. They are here, and nowhere else:

    set_input_tensor                               the schedules hand over what the stage before sent
    config, model_type, pre_process, post_process  what they and DDP look for
    share_embeddings_and_output_weights,           set where the first and the last stage hold copies of one weight: Megatron then sums the
    shared_embedding_or_output_weight,             gradients of both
    shared_embedding
"""

from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parallel.layout import Layout
from parallel.stage import Stage


class MegatronStage(nn.Module):
    """A model chunk as Megatron wants it: forward takes the microbatch alone."""

    def __init__(self, stage: Stage, config: TransformerConfig, layout: Layout):
        super().__init__()
        self.stage = stage
        self.config = config
        self.model_type = ModelType.encoder_or_decoder  # one input, one output a stage
        self.pre_process, self.post_process = layout.is_first_stage, layout.is_last_stage
        weight = stage.shared_weight
        self.share_embeddings_and_output_weights = weight is not None
        if weight is not None:
            weight.shared_embedding = True  # type: ignore[attr-defined]
        self._input: Tensor | None = None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """[sequence, batch, hidden] of the stage before, or None."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """What is duplicated on the first and the last stage."""
        return self.stage.shared_weight

    def forward(self, microbatch: Any) -> Tensor:
        return self.stage(microbatch, self._input)
