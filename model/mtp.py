"""Multi-token prediction: depth k predicts the token k + 1 places ahead, for a denser training signal and for speculative decoding.

    h_0 = the main stack's normed output
    h_k = final_norm(block(eh_proj [norm(embedding of token t + k) ; norm(h_{k-1})]))        logits_k = head(h_k)

Each depth continues from what its predecessor gave the head, as in Megatron-core. The output head and the embedding are the model's own; with
`model.mtp_shared` all depths are one block, applied again. Position t of depth k sees tokens up to t + k.
"""

import torch
from torch import Tensor, nn

from model.batch import Microbatch
from model.context import ModelContext
from model.layer import Layer
from model.linear import Linear
from model.norm import RMSNorm


class MTPBlock(nn.Module):
    """One depth's own modules."""

    def __init__(self, context: ModelContext, name: str, letters: str):
        super().__init__()
        self.context = context
        hidden = context.config.hidden_size
        self.embedding_norm = RMSNorm(context, f"{name}.embedding_norm")
        self.hidden_norm = RMSNorm(context, f"{name}.hidden_norm")
        self.eh_proj = Linear(context, f"{name}.eh_proj", 2 * hidden, hidden, "replicated", std=context.config.init_std)
        self.layers = nn.ModuleList(Layer(context, f"{name}.layers.{i}", letter) for i, letter in enumerate(letters))
        self.final_norm = RMSNorm(context, f"{name}.final_norm")

    def forward(self, embedded: Tensor, hidden: Tensor, microbatch: Microbatch) -> Tensor:
        """embedded: embeddings of the tokens k places ahead; hidden: of depth k - 1; both [sequence, batch, hidden]."""
        recompute = self.context.recompute
        with recompute.dropped("norm", self._joined, embedded, hidden) as joined:
            x = self.eh_proj(joined, microbatch)
        for layer in self.layers:
            x = layer(x, microbatch)
        return recompute.whole("norm", self.final_norm, x)

    def _joined(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), dim=-1)
