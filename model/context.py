"""What every module is built from: one object, passed to each constructor, so that no module reads a global."""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from model.config import ModelConfig
from model.precision.backend import Backend
from model.precision.backends.choice import choose
from model.precision.backends.reference import Reference
from model.precision.health import Health
from model.precision.policy import Policy
from model.precision.site import Site, WeightCache
from model.recompute import Recompute
from parallel.engine import ModelSizes
from parallel.layout import Layout
from parallel.megatron.config import transformer_config
from parallel.shards import Spread


@dataclass(frozen=True)
class LinearUse:
    """A linear layer for the accounts. rows, columns: of its whole weight (of one expert); spread: of that; flops: of its forward GEMM per
    token, of the whole model (experts: of those a token visits)."""

    module: str
    rows: int
    columns: int
    spread: Spread
    flops: float


@dataclass
class ModelContext:
    """config, layout, policy: see there. seed: of the run. device: where parameters live (`meta`: only counted).

    global_batch_size: sequences, which normalise the sequence-level auxiliary loss. sizes: for the engine. megatron: for what layers take
    from Megatron. linears: filled by the layers as they are built. backend, weights, health: of every linear layer's numerics; `weights` is
    cleared whenever weights have changed. recompute: what is computed again in the backward pass.
    """

    config: ModelConfig
    layout: Layout
    policy: Policy
    seed: int
    params_dtype: torch.dtype
    device: torch.device
    global_batch_size: int = 1
    sizes: ModelSizes = field(init=False)
    megatron: TransformerConfig = field(init=False)
    linears: list[LinearUse] = field(default_factory=list)
    backend: Backend = field(init=False)
    weights: WeightCache = field(default_factory=WeightCache)
    health: Health = field(default_factory=Health)
    recompute: Recompute = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.recompute = Recompute(self.layout.config.recompute)
        self.backend = choose(self.policy.config.backend, self.device) if self.device.type != "meta" else Reference()
        declared = {"attention_heads": self.layout.config.tensor}  # without attention: Megatron wants a number its tensor group divides
        for mixer in config.used:
            declared |= mixer.engine(config.sizes(mixer.sizes))
        self.sizes = ModelSizes(self.params_dtype, config.hidden_size, layers=len(config.layers), **declared)
        self.megatron = transformer_config(self.layout.config, self.sizes)

    @property
    def amax_group(self) -> torch.distributed.ProcessGroup | None:
        """Over which ranks amaxes are maximised, those with parts of the same tensors: None with precision.amax_scope=local."""
        layout = self.layout
        wanted = self.policy.config.amax_scope == "tensor_parallel" and layout.tensor_size * layout.context_size > 1
        return layout.groups.tp_cp if wanted else None

    def site(self, name: str, *, own_tokens: bool = False, **where: Any) -> Site:
        """A linear module of this model, for the numerics; see `Site` for `where`. own_tokens: every rank of the tensor group works on others."""
        amax_group = self.amax_group
        row_amax_group = None if amax_group is None or own_tokens or self.layout.tensor_size == 1 else self.layout.groups.tp
        if "first_expert" in where:
            # The ranks that split an expert work on the same tokens. Otherwise the ranks of a tensor group hold different experts, whose amaxes
            # have nothing to do with each other; or, without expert parallelism, the same ones, and share out their tokens.
            split = self.layout.expert_tensor_size > 1
            if split and self.policy.config.amax_scope == "tensor_parallel":
                amax_group = self.layout.groups.expt_tp
            elif split or self.layout.expert_size > 1:
                amax_group = None
            row_amax_group = amax_group if split else None
        return Site(
            name,
            self.seed,
            amax_group=amax_group,
            row_amax_group=row_amax_group,
            backend=self.backend,
            weights=self.weights,
            health=self.health,
            **where,
        )
