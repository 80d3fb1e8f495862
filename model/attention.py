"""Grouped-query attention, without positional embedding: order comes from the Mamba layers."""

from torch import Tensor, nn

from model.batch import Microbatch
from model.context import ModelContext
from model.linear import Linear
from model.mlp import output_std
from parallel.shards import Section


class Attention(nn.Module):
    """Causal attention through PyTorch's scaled_dot_product_attention; heads split over the tensor group.

    Query, key and value are one projection in memory and three tensors on disk.
    """

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        config, size = context.config, context.layout.tensor_size
        assert config.attention_heads and config.key_value_heads and config.head_dim
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.attention_heads // size, config.key_value_heads // size
        query, key_value = config.attention_heads * config.head_dim, config.key_value_heads * config.head_dim
        sections = [
            Section(f"{name}.q_proj.weight", query),
            Section(f"{name}.k_proj.weight", key_value),
            Section(f"{name}.v_proj.weight", key_value),
        ]
        hidden = config.hidden_size
        self.qkv_proj = Linear(context, f"{name}.qkv_proj", hidden, query + 2 * key_value, "column", std=config.init_std, sections=sections)
        self.o_proj = Linear(context, f"{name}.o_proj", query, hidden, "row", std=output_std(context))

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """x [sequence, batch, hidden] -> the same."""
        qkv = self.qkv_proj(x, microbatch)  # [sequence, batch, (heads + 2 kv_heads) * head_dim]
        sections = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)
        # [batch, heads, sequence, head_dim]
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3) for part in qkv.split(sections, dim=-1))
        mask = None
        if microbatch.reset:
            documents = microbatch.documents
            same = documents[:, :, None] == documents[:, None, :]
            mask = same.tril()[:, None]
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )
        return self.o_proj(out.permute(2, 0, 1, 3).flatten(2), microbatch)


def attention_flops(sequence_length: int, heads: int, head_dim: int) -> float:
    """Forward FLOPs per token of the score and value products, causal: half of the full square."""
    return 2 * 2 * heads * head_dim * sequence_length / 2
