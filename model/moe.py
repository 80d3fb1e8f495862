"""LatentMoE: experts that work in a narrower space than the model.

    x -> router (full width)                                    which experts, which weights
    x -> down-projection d -> latent -> dispatch -> experts latent -> ffn -> latent -> combine -> up-projection latent -> d
    x -> shared expert (full width)                             every token

The down-projection lies before the dispatch and the up-projection after the combine, so the all-to-all carries latent-wide tokens: d / latent
times less traffic. Without a latent size both projections vanish and this is the usual mixture of experts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model import init
from model.batch import Microbatch
from model.context import LinearUse, ModelContext
from model.exchange import AllToAll, Exchange
from model.fused_exchange import FUSED
from model.linear import Linear
from model.mixer import NOT_GIVEN, Dimension, HuggingFace, Mixer, Needed, Sizes, register_mixer
from model.mlp import MLP, squared_relu
from model.parameter import output_std, sharded_parameter
from model.precision.formats.base import Formats
from model.precision.gemm import GEMMS
from model.precision.linear import grouped_linear
from model.precision.site import Site, TokenKeys
from model.router import Router
from parallel.layout import ParallelConfig
from parallel.misfit import Misfit
from parallel.shards import Piece, Spread

SAMPLE_BITS, POSITION_BITS = 32, 32


@dataclass(frozen=True)
class MoESizes(Sizes):
    experts: Needed = NOT_GIVEN
    """Routed experts of a MoE layer."""
    top_k: Needed = NOT_GIVEN
    """Routed experts each token visits."""
    latent_size: int | None = None
    """Width of the space the routed experts work in; null: the model's full width."""
    expert_ffn_size: Needed = NOT_GIVEN
    """Hidden features of a routed expert."""
    shared_expert_ffn_size: Needed = NOT_GIVEN
    """Hidden features of the shared expert, which every token visits."""
    routed_scaling_factor: float = 1.0
    """What the weights of a token's routed experts sum up to."""
    router_bias_update_rate: float = 1e-3
    """How far an expert's bias moves per optimizer step towards an even load; 0: never."""
    router_aux_loss: float = 1e-4
    """Coefficient of the auxiliary loss that balances every sequence; 0: none."""

    def validate(self) -> None:
        if self.latent_size is not None and self.latent_size < 1:
            raise Misfit(f"model.latent_size={self.latent_size} must be at least 1", "model.latent_size")
        if self.top_k > self.experts:
            raise Misfit(f"model.top_k={self.top_k} exceeds model.experts={self.experts}", "model.top_k", "model.experts")
        for key in ("router_aux_loss", "router_bias_update_rate"):
            if getattr(self, key) < 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must not be negative: use 0 to switch it off")
        if not self.routed_scaling_factor > 0:
            raise ValueError(f"model.routed_scaling_factor={self.routed_scaling_factor} must be positive")


def check_layout(sizes: MoESizes, parallel: ParallelConfig) -> None:
    """Without sequence parallelism the ranks of a tensor group would dispatch the same tokens, each of them all."""
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        raise Misfit(
            f"parallel.sequence=false with parallel.tensor={parallel.tensor} cannot run MoE layers (E in model.pattern)",
            "parallel.sequence",
            "parallel.tensor",
        )


def stamp(keys: TokenKeys, dtype: torch.dtype) -> Tensor:
    """Token identities as numbers a floating-point column carries exactly: [tokens, columns] of `dtype`.

    The identity must reach the rank of the expert, where random bits are drawn by it; it travels as extra columns of the token. Each column
    holds a digit (16 bits in fp32, 8 in bf16), a small integer, so neither copies nor sums with zero can change it.
    """
    bits = 16 if dtype == torch.float32 else 8
    digits = [
        (value >> shift) & ((1 << bits) - 1)
        for value, width in ((keys.sample, SAMPLE_BITS), (keys.position, POSITION_BITS))
        for shift in range(0, width, bits)
    ]
    return torch.stack(digits, dim=1).to(dtype)


def read_stamp(columns: Tensor) -> TokenKeys:
    """The inverse of `stamp`."""
    bits = 16 if columns.dtype == torch.float32 else 8
    digits = columns.detach().long()
    per_key = SAMPLE_BITS // bits
    shifts = torch.arange(per_key, device=columns.device) * bits
    return TokenKeys(*((part << shifts).sum(1) for part in digits.split(per_key, dim=1)))


class Experts(nn.Module):
    """This rank's routed experts: down(relu(up(x))^2) for each; weights stacked, one tensor per expert on disk.

    Hidden features are split over the expert-tensor group, whose ranks work on the same tokens and each return a part of their sum.
    """

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        config, layout = context.config, context.layout
        sizes = config.sizes(MoESizes)
        self.context, self.name = context, name
        self.local = sizes.experts // layout.expert_size
        self.first = layout.expert_rank * self.local
        width, ffn = sizes.latent_size or config.hidden_size, sizes.expert_ffn_size
        part = ffn // layout.expert_tensor_size
        start = layout.expert_tensor_rank * part
        self.up_proj = self._stack("up_proj", (ffn, width), (part, width), (start, 0), config.init_std, "expert_rows")
        self.down_proj = self._stack("down_proj", (width, ffn), (width, part), (0, start), output_std(context), "expert_columns")
        features = ((start, part),) if layout.expert_tensor_size > 1 else ()
        self.sites = {
            "up_proj": context.site(f"{name}.up_proj", first_expert=self.first, outputs=features),
            "down_proj": context.site(f"{name}.down_proj", first_expert=self.first, inputs=features),
        }
        flops = 2.0 * width * ffn * sizes.top_k
        context.linears.append(LinearUse(f"{name}.up_proj", ffn, width, "expert_rows", flops))
        context.linears.append(LinearUse(f"{name}.down_proj", width, ffn, "expert_columns", flops))

    def _stack(
        self, kind: str, shape: tuple[int, int], part: tuple[int, int], offset: tuple[int, int], std: float, spread: Spread
    ) -> nn.Parameter:
        everything = (slice(None), slice(None))
        pieces = [Piece(f"{self.name}.{self.first + e}.{kind}.weight", shape, offset, (e, *everything)) for e in range(self.local)]
        return sharded_parameter(self.context, (self.local, *part), pieces, init.normal(std), spread)

    def formats(self, kind: str, microbatch: Microbatch) -> Formats:
        return self.context.policy.formats(f"{self.name}.{kind}", microbatch.progress)

    def weights(self) -> list[tuple[Site, nn.Parameter]]:
        """The stacked weights, [experts, N, K], and what the numerics know of them."""
        return [(self.sites["up_proj"], self.up_proj), (self.sites["down_proj"], self.down_proj)]

    def draws(self, microbatch: Microbatch) -> bool:
        """Whether any GEMM of these experts needs random bits for each token now."""
        return any(
            form.draws(gemm)
            for kind in ("up_proj", "down_proj")
            for gemm, form in zip(GEMMS, self.formats(kind, microbatch), strict=True)
            if self.training or gemm == "fprop"
        )

    def forward(self, x: Tensor, tokens_per_expert: list[int], keys: TokenKeys, microbatch: Microbatch) -> Tensor:
        """x [tokens, width], sorted by expert -> the same."""

        def apply(kind: str, x: Tensor) -> Tensor:
            weight = getattr(self, kind)
            site, formats = self.sites[kind], self.formats(kind, microbatch)
            return grouped_linear(x, weight, tokens_per_expert, formats, site, keys, microbatch.step, singly=microbatch.few)

        with self.context.recompute.dropped("activation", squared_relu, apply("up_proj", x)) as active:
            return apply("down_proj", active)


class MoE(nn.Module):
    """Router, latent projections, routed experts and the shared expert of one layer."""

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        config, layout = context.config, context.layout
        sizes = config.sizes(MoESizes)
        check_layout(sizes, layout.config)
        self.context = context
        self.router = Router(
            context,
            f"{name}.gate",
            experts=sizes.experts,
            top_k=sizes.top_k,
            scaling_factor=sizes.routed_scaling_factor,
            aux_loss=sizes.router_aux_loss,
            bias_update_rate=sizes.router_bias_update_rate,
        )
        self.down: Linear | None = None
        self.up: Linear | None = None
        if sizes.latent_size is not None:
            hidden, latent = config.hidden_size, sizes.latent_size
            self.down = Linear(context, f"{name}.fc1_latent_proj", hidden, latent, "replicated", std=config.init_std)
            self.up = Linear(context, f"{name}.fc2_latent_proj", latent, hidden, "replicated", std=output_std(context))
        self.experts = Experts(context, f"{name}.experts")
        self.shared_experts = MLP(context, f"{name}.shared_experts", sizes.shared_expert_ffn_size)
        if context.device.type != "meta":
            own = range(self.experts.first, self.experts.first + self.experts.local)
            self.exchange: Exchange
            if layout.config.dispatcher in FUSED:
                self.exchange = FUSED[layout.config.dispatcher](own, sizes.experts, sizes.top_k, layout.groups.ep)
            else:
                self.exchange = AllToAll(own, context.megatron, layout.groups, lambda ask: context.recompute.once(ask))

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """x [sequence, batch, hidden] -> the same; with sequence parallelism both hold this rank's part of the sequence."""
        return self.context.recompute.whole("moe", self._forward, x, microbatch)

    def _forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        weights, chosen = self.router(x, microbatch)
        tokens = x if self.down is None else self.down(x, microbatch)
        width, stamped = tokens.shape[-1], self.experts.draws(microbatch)
        if stamped:
            columns = stamp(microbatch.keys(microbatch.own_positions(self.context.layout)), tokens.dtype)
            tokens = torch.cat((tokens, columns.view(*tokens.shape[:-1], -1)), dim=-1)
        visit = self.exchange(tokens.flatten(0, 1), chosen, weights)
        routed = visit.rows
        if stamped:
            keys, routed = replace(read_stamp(routed[:, width : width + columns.shape[-1]]), depth=microbatch.depth), routed[:, :width]
        else:
            nobody = torch.zeros(len(routed), dtype=torch.int64, device=x.device)
            keys = TokenKeys(nobody, nobody)
        out = self.experts(routed, visit.counts, keys, microbatch)
        out = visit.back((out * visit.weights.unsqueeze(-1)).to(x.dtype)).view(*x.shape[:-1], width)
        if self.up is not None:
            out = self.up(out, microbatch)
        return out + self.shared_experts(x, microbatch)


def active_share(sizes: MoESizes, parameter: str) -> float:
    return sizes.top_k / sizes.experts if parameter.startswith("experts.") else 1.0


register_mixer(
    Mixer(
        letter="E",
        name="MoE",
        build=MoE,
        sizes=MoESizes,
        context_tokens=lambda sizes: 1,
        dimensions=(
            Dimension("experts", ("expert",)),
            Dimension("expert_ffn_size", ("expert_tensor",)),
            Dimension("shared_expert_ffn_size", ("tensor",)),
        ),
        check_layout=check_layout,
        active_share=active_share,
        engine=lambda sizes: {"experts": sizes.experts, "top_k": sizes.top_k},
        hugging_face=HuggingFace(
            "moe",
            keys={
                "n_routed_experts": "experts",
                "num_experts_per_tok": "top_k",
                "moe_latent_size": "latent_size",
                "moe_intermediate_size": "expert_ffn_size",
                "moe_shared_expert_intermediate_size": "shared_expert_ffn_size",
                "routed_scaling_factor": "routed_scaling_factor",
            },
            constants={
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": True,
                "n_shared_experts": 1,
                "mlp_bias": False,
                "mlp_hidden_act": "relu2",
            },
        ),
    )
)
