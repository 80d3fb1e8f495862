"""Mamba-2 mixer: input projection, short causal convolution, state-space recurrence, gated norm, output projection."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import init
from model.batch import Microbatch
from model.cache import MambaState
from model.context import ModelContext
from model.convolution import causal_convolution
from model.elementwise import evenly
from model.linear import Linear
from model.mixer import NOT_GIVEN, Dimension, HuggingFace, Mixer, Needed, Products, Sizes, register_mixer
from model.norm import gated_group_norm
from model.parameter import output_std, sharded_parameter
from model.ssd import ssd, ssd_flops, stepped
from parallel.context import Scan, halo, to_heads, to_tokens
from parallel.layout import ParallelConfig
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


def check_layout(sizes: MambaSizes, parallel: ParallelConfig) -> None:
    """All-to-all gives every rank of the context group some of the heads a tensor rank has, and the groups those belong to."""
    ranks, tensor = parallel.context, parallel.tensor
    if ranks == 1 or parallel.context_mamba != "all_to_all":
        return
    heads, groups = sizes.mamba_heads // tensor, sizes.mamba_groups // tensor
    if not _shares_out(heads, groups, ranks):
        each = f" / parallel.tensor={tensor}" if tensor > 1 else ""
        raise Misfit(
            f"parallel.context={ranks} with parallel.context_mamba=all_to_all does not share out model.mamba_heads={sizes.mamba_heads} and "
            f"model.mamba_groups={sizes.mamba_groups}{each}",
            "parallel.context",
            "parallel.context_mamba",
        )


def _shares_out(heads: int, groups: int, ranks: int) -> bool:
    """Whether each of `ranks` gets as many heads, of whole groups or of one."""
    return heads % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0)


class MambaMixer(nn.Module):
    """in_proj -> (z, x, B, C, dt); convolution and SiLU on x, B, C; SSD; RMSNorm(y * silu(z)) per group; out_proj.

    Heads and groups are split over the tensor group. Convolution, recurrence and norm are computed in fp32.

    Where ranks split sequences (parallel.context), projections and norm work on a rank's own tokens. Between them either the convolution gets
    the last tokens of the rank before, and states are handed on from rank to rank; or every rank gets all tokens of some heads.
    """

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        self.context = context
        config, layout = context.config, context.layout
        sizes = config.sizes(MambaSizes)
        self.layout = layout
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
        projected = self.in_proj(x, microbatch)  # [sequence, batch, z | x | B | C | dt]
        return self.out_proj(self.context.recompute.whole("mamba", self._core, projected, microbatch), microbatch)

    def _core(self, projected: Tensor, microbatch: Microbatch) -> Tensor:
        """What lies between the projections."""
        gate, convolved, dt = projected.split((self.inner, self.inner + 2 * self.shared, self.heads), dim=-1)
        whole_or_handed_on = self.layout.context_size == 1 or self.layout.config.context_mamba == "state"
        y = (self._mixed if whole_or_handed_on else self._mixed_by_heads)(convolved, dt, microbatch)
        return gated_group_norm(y, gate, self.norm_weight, self.inner // self.groups, self.eps, singly=microbatch.singly)

    def _mixed(self, convolved: Tensor, dt: Tensor, microbatch: Microbatch) -> Tensor:
        """Convolution and recurrence: x | B | C and dt, both [sequence, batch, features] -> [sequence, batch, inner]."""
        documents = microbatch.documents if microbatch.reset else None
        weights = self.conv_weight, self.conv_bias, self.A_log, self.D, self.dt_bias
        if microbatch.cache is not None:
            rows = self.conv_weight.shape[-1] - 1
            state = microbatch.cache.of(self, lambda: MambaState(convolved.new_zeros(rows, *convolved.shape[1:])))
            rows_before = state.shift(convolved)
            if microbatch.cache.revocable:
                return self._step(convolved, dt, rows_before, state)
            return self._recur(convolved, dt, weights, self.groups, None, rows_before, None, state)
        if self.layout.context_size == 1:
            return self._recur(convolved, dt, weights, self.groups, documents)
        group, rows = self.layout.groups.cp, self.conv_weight.shape[-1] - 1
        before = halo(convolved, rows, group) if rows else None
        preceding = microbatch.documents_before(rows or 1) if microbatch.reset else None
        return self._recur(convolved, dt, weights, self.groups, documents, before, preceding, Scan(group))

    def _mixed_by_heads(self, convolved: Tensor, dt: Tensor, microbatch: Microbatch) -> Tensor:
        """The same by all-to-all: every rank has whole sequences of some heads."""
        group, ranks, rank = self.layout.groups.cp, self.layout.context_size, self.layout.context_rank
        groups = max(1, self.groups // ranks)
        copies = ranks * groups // self.groups  # ranks that work with the same B and C

        def shared_out(part: Tensor, dim: int) -> Tensor:
            """Groups of B or C by the rank that gets them."""
            return part.unflatten(dim, (ranks // copies, -1)).repeat_interleave(copies, dim)

        def by_rank(part: Tensor, dim: int) -> Tensor:
            """x | B | C by the rank that gets them: dimension `dim` becomes two, [ranks, features]."""
            x, b, c = part.split((self.inner, self.shared, self.shared), dim)
            return torch.cat((x.unflatten(dim, (ranks, -1)), shared_out(b, dim), shared_out(c, dim)), dim + 1)

        sent = torch.cat((by_rank(convolved, 2), dt.unflatten(2, (ranks, -1))), -1)
        received = to_heads(sent, group)
        heads = self.heads // ranks
        convolved, dt = received.split((received.shape[-1] - heads, heads), -1)
        weights = by_rank(self.conv_weight, 0)[rank], by_rank(self.conv_bias, 0)[rank]
        of_heads = (weight.unflatten(0, (ranks, -1))[rank] for weight in (self.A_log, self.D, self.dt_bias))
        documents = microbatch.whole_documents if microbatch.reset else None
        y = self._recur(convolved, dt, (*weights, *of_heads), groups, documents)
        return to_tokens(y, group).flatten(2)

    def _recur(
        self,
        convolved: Tensor,
        dt: Tensor,
        weights: tuple[Tensor, ...],
        groups: int,
        documents: Tensor | None,
        before: Tensor | None = None,
        preceding: Tensor | None = None,
        scan: Scan | MambaState | None = None,
    ) -> Tensor:
        """weights: of the convolution, its bias, A_log, D and dt_bias. before: rows of x | B | C, and preceding: documents, right before these."""
        conv_weight, conv_bias, A_log, D, dt_bias = weights
        seen = documents
        if documents is not None and preceding is not None and before is not None:
            seen = torch.cat((preceding, documents), dim=1)
        out = causal_convolution(convolved, conv_weight, conv_bias, seen, before)
        x, b, c = self._parts(out, dt.shape[-1], groups)
        y = ssd(
            x,
            nn.functional.softplus(dt.float() + dt_bias.float()).transpose(0, 1),
            -torch.exp(A_log.float()),
            b,
            c,
            D,
            documents=documents,
            chunk_size=self.chunk_size,
            scan=scan,
            preceding=None if preceding is None else preceding[:, -1],
        )
        return y.transpose(0, 1).flatten(2).to(convolved.dtype)

    def _parts(self, convolved: Tensor, heads: int, groups: int) -> Iterator[Tensor]:
        """x, B and C, each [batch, sequence, heads or groups, features]."""
        shared = groups * self.shared // self.groups
        sizes = (convolved.shape[-1] - 2 * shared, shared, shared)
        for part, count in zip(convolved.split(sizes, dim=-1), (heads, groups, groups), strict=True):
            yield part.transpose(0, 1).unflatten(-1, (count, -1))

    def _step(self, convolved: Tensor, dt: Tensor, before: Tensor, state: MambaState) -> Tensor:
        """`_recur` of a few tokens one after another, of which the state keeps what each leaves. before: rows of x | B | C right before these."""
        taps = self.conv_weight[:, 0].float().T  # [width, channels]
        windows = torch.cat((before, convolved)).float().unfold(0, len(taps), 1)  # [sequence, batch, channels, width]
        out = self.conv_bias.float()
        for window, tap in zip(windows.unbind(-1), taps, strict=True):
            out = torch.addcmul(out, window, tap)
        x, b, c = self._parts(evenly(nn.functional.silu, out), self.heads, self.groups)
        dt = evenly(nn.functional.softplus, dt.float() + self.dt_bias.float()).transpose(0, 1)
        y, states = stepped(x, dt, -torch.exp(self.A_log.float()), b, c, self.D.float(), state.state)
        state.leave(states)
        return y.transpose(0, 1).flatten(2).to(convolved.dtype)


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
        check_layout=check_layout,
        context_tokens=lambda sizes: max(1, sizes.mamba_conv_width - 1),
        dimensions=(Dimension("mamba_heads", ("tensor",)), Dimension("mamba_groups", ("tensor",))),
        products=products,
        hugging_face=HuggingFace(
            "mamba",
            aliases=("linear_attention",),
            keys={
                "mamba_num_heads": "mamba_heads",
                "mamba_head_dim": "mamba_head_dim",
                "ssm_state_size": "mamba_state_size",
                "n_groups": "mamba_groups",
                "mamba_n_groups": "mamba_groups",
                "conv_kernel": "mamba_conv_width",
                "chunk_size": "mamba_chunk_size",
            },
            constants={"mamba_hidden_act": "silu", "use_bias": False, "mamba_proj_bias": False, "use_conv_bias": True},
        ),
    )
)
