"""The model's hyper-parameters: the recipe's `model` group."""

from dataclasses import dataclass
from functools import cached_property

from model.pattern import Pattern, parse


@dataclass(frozen=True)
class ModelConfig:
    """Sizes may stay None when the pattern has no layer that needs them."""

    pattern: str
    vocab_size: int
    hidden_size: int
    # attention (*)
    attention_heads: int | None = None
    key_value_heads: int | None = None
    head_dim: int | None = None
    # Mamba-2 (M)
    mamba_heads: int | None = None
    mamba_head_dim: int | None = None
    mamba_state_size: int | None = None
    mamba_groups: int | None = None
    mamba_conv_width: int = 4
    mamba_chunk_size: int = 128
    # dense MLP (-)
    ffn_hidden_size: int | None = None
    # mixture of experts (E)
    experts: int | None = None
    top_k: int | None = None
    latent_size: int | None = None  # None: experts work at full width
    expert_ffn_size: int | None = None
    shared_expert_ffn_size: int | None = None
    routed_scaling_factor: float = 1.0
    router_bias_update_rate: float = 1e-3
    router_aux_loss: float = 1e-4
    norm_eps: float = 1e-5
    init_std: float = 0.02
    mtp_shared: bool = True  # all MTP depths are one block, applied again
    mtp_loss_scale: float = 0.3

    @cached_property
    def parsed(self) -> Pattern:
        return parse(self.pattern)

    @property
    def layers(self) -> str:
        """The main stack, one letter a layer."""
        return self.parsed.main

    @property
    def mtp_depths(self) -> int:
        return len(self.parsed.mtp)

    @property
    def mtp_blocks(self) -> int:
        """Blocks in memory: one when shared."""
        return min(self.mtp_depths, 1) if self.mtp_shared else self.mtp_depths

    @property
    def mamba_inner(self) -> int:
        assert self.mamba_heads and self.mamba_head_dim
        return self.mamba_heads * self.mamba_head_dim

    def validate(self) -> None:
        """Raises ValueError, in one sentence naming the key, for sizes no model can have."""
        pattern = self.parsed
        letters = set("".join((pattern.main, *pattern.mtp)))
        needed = {
            "*": ("attention_heads", "key_value_heads", "head_dim"),
            "M": ("mamba_heads", "mamba_head_dim", "mamba_state_size", "mamba_groups"),
            "-": ("ffn_hidden_size",),
            "E": ("experts", "top_k", "expert_ffn_size", "shared_expert_ffn_size"),
        }
        sizes = [("vocab_size", self.vocab_size), ("hidden_size", self.hidden_size)]
        for letter in sorted(letters):
            for key in needed[letter]:
                value = getattr(self, key)
                if value is None:
                    raise ValueError(f"model.{key} is missing: model.pattern={self.pattern!r} has a {letter!r} layer, which needs it")
                sizes.append((key, value))
        sizes += [("mamba_conv_width", self.mamba_conv_width), ("mamba_chunk_size", self.mamba_chunk_size)]
        if self.latent_size is not None:
            sizes.append(("latent_size", self.latent_size))
        for key, value in sizes:
            if value < 1:
                raise ValueError(f"model.{key}={value} must be at least 1")
        if "*" in letters:
            assert self.attention_heads and self.key_value_heads
            if self.attention_heads % self.key_value_heads:
                raise ValueError(
                    f"model.attention_heads={self.attention_heads} must be a multiple of model.key_value_heads={self.key_value_heads}"
                )
        if "M" in letters:
            assert self.mamba_heads and self.mamba_groups
            if self.mamba_heads % self.mamba_groups:
                raise ValueError(f"model.mamba_heads={self.mamba_heads} must be a multiple of model.mamba_groups={self.mamba_groups}")
        if "E" in letters:
            assert self.experts and self.top_k
            if self.top_k > self.experts:
                raise ValueError(f"model.top_k={self.top_k} exceeds model.experts={self.experts}: choose at most that many per token")
        if self.mtp_shared and len(set(pattern.mtp)) > 1:
            raise ValueError(
                f"model.pattern={self.pattern!r} has MTP depths that differ ({', '.join(pattern.mtp)}), but model.mtp_shared=true makes "
                "them one block: repeat the same depth, or set model.mtp_shared=false"
            )
        for key in ("router_aux_loss", "router_bias_update_rate", "mtp_loss_scale"):
            if getattr(self, key) < 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must not be negative: use 0 to switch it off")
        for key in ("norm_eps", "init_std", "routed_scaling_factor"):
            if not getattr(self, key) > 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must be positive")
