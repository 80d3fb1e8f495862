"""Mamba-2 mixer: input projection, short causal convolution, state-space recurrence, gated norm, output projection."""

import torch
from torch import Tensor, nn

from model import init
from model.batch import Microbatch
from model.context import ModelContext
from model.linear import Linear
from model.mlp import output_std
from model.norm import gated_group_norm
from model.ssd import ssd
from parallel.shards import Section, mark_sharded, set_pieces, split_sections


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None) -> Tensor:
    """Depthwise: y_t = bias + sum_k weight_k x_{t - width + 1 + k}, where x before the sequence, or in another document, is 0.

    x: [batch, sequence, channels]; weight: [channels, 1, width]; documents: int [batch, sequence] or None.
    """
    width = weight.shape[-1]
    if documents is None:
        channels_first = nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
        return nn.functional.conv1d(channels_first, weight, bias, groups=x.shape[-1]).transpose(1, 2)
    y = bias + x * weight[:, 0, width - 1]
    for back in range(1, width):
        earlier = nn.functional.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        same = documents == nn.functional.pad(documents, (back, 0), value=-1)[:, : x.shape[1]]
        y = y + earlier * same.unsqueeze(-1) * weight[:, 0, width - 1 - back]
    return y


class MambaMixer(nn.Module):
    """in_proj -> (z, x, B, C, dt); convolution and SiLU on x, B, C; SSD; RMSNorm(y * silu(z)) per group; out_proj.

    Heads and groups are split over the tensor group. The recurrence and its parameters (A_log, D, dt_bias) are computed in fp32.
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
            local = (sum(sizes) // size, *trailing)
            param = nn.Parameter(torch.empty(local, device=context.device, dtype=context.params_dtype))
            set_pieces(param, split_sections(sections(tensor, sizes), trailing, rank, size))
            mark_sharded(param, 0)
            init.initialize(param, context.seed, draw)
            return param

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
        projected = self.in_proj(x, microbatch).transpose(0, 1)  # [batch, sequence, z | x | B | C | dt]
        gate, convolved, dt = projected.split((self.inner, self.inner + 2 * self.shared, self.heads), dim=-1)
        convolved = nn.functional.silu(causal_convolution(convolved, self.conv_weight, self.conv_bias, documents))
        inputs, b, c = convolved.split((self.inner, self.shared, self.shared), dim=-1)
        y = ssd(
            inputs.unflatten(-1, (self.heads, self.head_dim)),
            nn.functional.softplus(dt.float() + self.dt_bias.float()),
            -torch.exp(self.A_log.float()),
            b.unflatten(-1, (self.groups, self.state_size)),
            c.unflatten(-1, (self.groups, self.state_size)),
            self.D,
            documents=documents,
            chunk_size=self.chunk_size,
        ).flatten(2)
        normed = gated_group_norm(y.to(projected.dtype), gate, self.norm_weight, self.inner // self.groups, self.eps)
        return self.out_proj(normed.transpose(0, 1), microbatch)
