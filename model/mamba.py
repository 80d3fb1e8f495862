"""Mamba-2 mixer: input projection, short causal convolution, state-space recurrence, gated norm, output projection."""

import torch
from torch import Tensor, nn

from model import init
from model.batch import Microbatch
from model.context import ModelContext
from model.convolution import causal_convolution
from model.linear import Linear
from model.mlp import output_std
from model.norm import gated_group_norm
from model.parameter import sharded_parameter
from model.ssd import ssd
from parallel.shards import Section, split_sections


class MambaMixer(nn.Module):
    """in_proj -> (z, x, B, C, dt); convolution and SiLU on x, B, C; SSD; RMSNorm(y * silu(z)) per group; out_proj.

    Heads and groups are split over the tensor group. Convolution, recurrence and norm are computed in fp32.
    """

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        config, layout = context.config, context.layout
        assert config.mamba_heads and config.mamba_head_dim and config.mamba_state_size and config.mamba_groups
        size, rank = layout.tensor_size, layout.tensor_rank
        self.eps, self.chunk_size = config.norm_eps, config.mamba_chunk_size
        self.head_dim, self.state_size = config.mamba_head_dim, config.mamba_state_size
        self.heads, self.groups = config.mamba_heads // size, config.mamba_groups // size
        inner, shared = config.mamba_inner, config.mamba_groups * config.mamba_state_size
        self.inner, self.shared = inner // size, shared // size

        def sections(tensor: str, sizes: tuple[int, ...]) -> list[Section]:
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            return [Section(f"{name}.{tensor}", rows, start) for rows, start in zip(sizes, starts, strict=True)]

        projected = (inner, inner, shared, shared, config.mamba_heads)  # z, x, B, C, dt
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
        width = config.mamba_conv_width

        def parameter(tensor: str, sizes: tuple[int, ...], trailing: tuple[int, ...], draw: init.Draw) -> nn.Parameter:
            pieces = split_sections(sections(tensor, sizes), trailing, rank, size)
            return sharded_parameter(context, (sum(sizes) // size, *trailing), pieces, draw, "rows")

        self.conv_weight = parameter("conv1d.weight", convolved, (1, width), init.uniform(width**-0.5))
        self.conv_bias = parameter("conv1d.bias", convolved, (), init.uniform(width**-0.5))
        heads = (config.mamba_heads,)
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
