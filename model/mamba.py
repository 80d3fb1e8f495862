"""Mamba-2 mixer: input projection, short causal convolution, state-space recurrence, gated norm, output projection."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import init
from model.batch import Microbatch
from model.context import ModelContext
from model.convolution import causal_convolution
from model.linear import Linear
from model.mixer import NOT_GIVEN, Dimension, HuggingFace, Mixer, Needed, Products, Sizes, register_mixer
from model.norm import gated_group_norm
from model.parameter import output_std, sharded_parameter
from model.ssd import ssd, ssd_flops
from parallel.misfit import Misfit
from parallel.shards import Section, split_sections


@dataclass(frozen=True)
class MambaSizes(Sizes):
    mamba_heads: Needed = NOT_GIVEN
    """Heads of the state-space recurrence."""
    mamba_head_dim: Needed = NOT_GIVEN
    """Features of a head of Mamba-2."""
    mamba_state_size: Needed = NOT_GIVEN
    """Numbers of state each feature of a head keeps."""
    mamba_groups: Needed = NOT_GIVEN
    """Groups of heads that share B and C, and whose features are normed together."""
    mamba_conv_width: int = 4
    """Tokens the causal convolution sees, the current one included."""
    mamba_chunk_size: int = 128
    """Tokens of a chunk of the recurrence: speed and memory, not values; a CPU takes less where that is faster."""

    def validate(self) -> None:
        for key in ("mamba_conv_width", "mamba_chunk_size"):
            if getattr(self, key) < 1:
                raise Misfit(f"model.{key}={getattr(self, key)} must be at least 1", f"model.{key}")
        if self.mamba_heads % self.mamba_groups:
            raise Misfit(
                f"model.mamba_heads={self.mamba_heads} is not a multiple of model.mamba_groups={self.mamba_groups}",
                "model.mamba_groups",
                "model.mamba_heads",
            )


class MambaMixer(nn.Module):
    """in_proj -> (z, x, B, C, dt); convolution and SiLU on x, B, C; SSD; RMSNorm(y * silu(z)) per group; out_proj.

    Heads and groups are split over the tensor group. Convolution, recurrence and norm are computed in fp32.
    """

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        config, layout = context.config, context.layout
        sizes = config.sizes(MambaSizes)
        size, rank = layout.tensor_size, layout.tensor_rank
        self.eps, self.chunk_size = config.norm_eps, sizes.mamba_chunk_size
        self.heads, self.groups = sizes.mamba_heads // size, sizes.mamba_groups // size
        inner, shared = sizes.mamba_heads * sizes.mamba_head_dim, sizes.mamba_groups * sizes.mamba_state_size
        self.inner, self.shared = inner // size, shared // size

        def sections(tensor: str, runs: tuple[int, ...]) -> list[Section]:
            starts = [sum(runs[:i]) for i in range(len(runs))]
            return [Section(f"{name}.{tensor}", rows, start) for rows, start in zip(runs, starts, strict=True)]

        projected = (inner, inner, shared, shared, sizes.mamba_heads)  # z, x, B, C, dt
        self.in_proj = Linear(
            context,
            f"{name}.in_proj",
            config.hidden_size,
            sum(projected),
            "column",
            std=config.init_std,
            sections=sections("in_proj.weight", projected),
        )
        convolved = (inner, shared, shared)  # x, B, C
        width = sizes.mamba_conv_width

        def parameter(tensor: str, runs: tuple[int, ...], trailing: tuple[int, ...], draw: init.Draw) -> nn.Parameter:
            pieces = split_sections(sections(tensor, runs), trailing, rank, size)
            return sharded_parameter(context, (sum(runs) // size, *trailing), pieces, draw, "rows")

        self.conv_weight = parameter("conv1d.weight", convolved, (1, width), init.uniform(width**-0.5))
        self.conv_bias = parameter("conv1d.bias", convolved, (), init.uniform(width**-0.5))
        heads = (sizes.mamba_heads,)
        self.A_log = parameter("A_log", heads, (), init.log_of_uniform(1.0, 16.0))
        self.D = parameter("D", heads, (), init.constant(1.0))
        self.dt_bias = parameter("dt_bias", heads, (), init.step_size_bias())
        self.norm_weight = parameter("norm.weight", (inner,), (), init.constant(1.0))
        self.out_proj = Linear(context, f"{name}.out_proj", inner, config.hidden_size, "row", std=output_std(context))

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """x [sequence, batch, hidden] -> the same."""
        documents = microbatch.documents if microbatch.reset else None
        projected = self.in_proj(x, microbatch)  # [sequence, batch, z | x | B | C | dt]
        gate, convolved, dt = projected.split((self.inner, self.inner + 2 * self.shared, self.heads), dim=-1)
        convolved = causal_convolution(convolved, self.conv_weight, self.conv_bias, documents)
        inputs, b, c = (
            part.transpose(0, 1).unflatten(-1, (count, -1))
            for part, count in zip(
                convolved.split((self.inner, self.shared, self.shared), dim=-1),
                (self.heads, self.groups, self.groups),
                strict=True,
            )
        )
        y = ssd(
            inputs,
            nn.functional.softplus(dt.float() + self.dt_bias.float()).transpose(0, 1),
            -torch.exp(self.A_log.float()),
            b,
            c,
            self.D,
            documents=documents,
            chunk_size=self.chunk_size,
        )
        y = y.transpose(0, 1).flatten(2).to(projected.dtype)
        normed = gated_group_norm(y, gate, self.norm_weight, self.inner // self.groups, self.eps)
        return self.out_proj(normed, microbatch)


def products(sizes: MambaSizes, sequence_length: int) -> tuple[Products, ...]:
    """The products of the chunked recurrence, which is computed in fp32."""
    chunk = min(sizes.mamba_chunk_size, sequence_length)
    flops = ssd_flops(sizes.mamba_heads, sizes.mamba_head_dim, sizes.mamba_state_size, sizes.mamba_groups, chunk)
    return (Products("SSD", flops, fp32=True),)


register_mixer(
    Mixer(
        letter="M",
        name="Mamba-2",
        build=MambaMixer,
        sizes=MambaSizes,
        dimensions=(Dimension("mamba_heads", ("tensor",)), Dimension("mamba_groups", ("tensor",))),
        products=products,
        hugging_face=HuggingFace(
            "linear_attention",
            aliases=("mamba",),
            keys={
                "mamba_num_heads": "mamba_heads",
                "mamba_head_dim": "mamba_head_dim",
                "ssm_state_size": "mamba_state_size",
                "n_groups": "mamba_groups",
                "conv_kernel": "mamba_conv_width",
                "chunk_size": "mamba_chunk_size",
            },
            constants={"mamba_hidden_act": "silu", "use_bias": False, "mamba_proj_bias": False, "use_conv_bias": True},
        ),
    )
)
