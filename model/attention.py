"""Grouped-query attention, without positional embedding: order comes from the Mamba layers."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from model.batch import Microbatch
from model.cache import KeysValues
from model.causal import cached_attention, causal_attention
from model.context import ModelContext
from model.linear import Linear
from model.mixer import NOT_GIVEN, Dimension, HuggingFace, Mixer, Needed, Products, Sizes, register_mixer
from model.parameter import output_std
from model.split_attention import split_attention
from parallel.misfit import Misfit
from parallel.shards import Section


@dataclass(frozen=True)
class AttentionSizes(Sizes):
    attention_heads: Needed = NOT_GIVEN
    """Query heads."""
    key_value_heads: Needed = NOT_GIVEN
    """Heads of keys and values, each shared by attention_heads / key_value_heads query heads."""
    head_dim: Needed = NOT_GIVEN
    """Features of a head of attention."""

    def validate(self) -> None:
        if self.attention_heads % self.key_value_heads:
            raise Misfit(
                f"model.attention_heads={self.attention_heads} is not a multiple of model.key_value_heads={self.key_value_heads}",
                "model.key_value_heads",
                "model.attention_heads",
            )


class Attention(nn.Module):
    """Causal attention (`model.causal`); heads split over the tensor group.

    Query, key and value are one projection in memory and three tensors on disk. Where ranks split sequences: `model.split_attention`.
    """

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        self.layout = context.layout
        config, tensor = context.config, context.layout.tensor_size
        sizes = config.sizes(AttentionSizes)
        self.head_dim = sizes.head_dim
        self.heads, self.kv_heads = sizes.attention_heads // tensor, sizes.key_value_heads // tensor
        query, key_value = sizes.attention_heads * sizes.head_dim, sizes.key_value_heads * sizes.head_dim
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
        if self.layout.context_size > 1:
            query, key_value = qkv.split((sections[0], sum(sections[1:])), dim=-1)
            query, key_value = query.unflatten(-1, (-1, self.head_dim)), key_value.unflatten(-1, (2, -1, self.head_dim))
            out = split_attention(query, key_value, microbatch, self.layout.groups.cp)
        else:
            query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(sections, dim=-1))
            if microbatch.cache is None:
                out = causal_attention(query, key, value, microbatch.bounds)
            else:
                held = microbatch.cache.of(self, self._no_tokens(key))
                out = cached_attention(query, key, value, held, microbatch.cache.lengths, singly=microbatch.singly)
        return self.o_proj(out.flatten(2), microbatch)

    def _no_tokens(self, key: Tensor) -> Callable[[], KeysValues]:
        return lambda: KeysValues(*(key.new_zeros(key.shape[1], 0, *key.shape[2:]) for _ in range(2)))


def products(sizes: AttentionSizes, sequence_length: int) -> tuple[Products, ...]:
    """The score and value products, causal: half of the full square."""
    return (Products("attention", 2 * 2 * sizes.attention_heads * sizes.head_dim * sequence_length / 2),)


register_mixer(
    Mixer(
        letter="*",
        name="attention",
        build=Attention,
        sizes=AttentionSizes,
        context_tokens=lambda sizes: 1,
        dimensions=(Dimension("attention_heads", ("tensor",)), Dimension("key_value_heads", ("tensor",))),
        products=products,
        engine=lambda sizes: {"attention_heads": sizes.attention_heads},
        hugging_face=HuggingFace(
            "attention",
            aliases=("full_attention",),
            keys={"num_attention_heads": "attention_heads", "num_key_value_heads": "key_value_heads", "head_dim": "head_dim"},
            constants={"attention_bias": False},
        ),
    )
)
