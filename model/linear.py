"""Linear layers over the tensor group, each GEMM in the format the policy gives it.

column      output features are split; a sequence-parallel input is gathered first
row         input features are split; the partial products are summed, or reduce-scattered along the sequence
replicated  every rank holds the whole weight and works on its own tokens
"""

from collections.abc import Sequence
from typing import Literal

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from model import init
from model.batch import Microbatch
from model.context import LinearUse, ModelContext
from model.parameter import sharded_parameter
from model.precision.linear import linear
from model.precision.site import Site, TokenKeys
from parallel.shards import Piece, Section, Spread, split_sections

Mode = Literal["column", "row", "replicated"]
SPREAD: dict[Mode, Spread] = {"column": "rows", "row": "columns", "replicated": "everywhere"}  # of the weight [out, in]


class Linear(nn.Module):
    """y = x W^T, never a bias.

    name: canonical module name, which the policy and the random bits know. std: of the initial weights. sections: rows
    of W by the tensors they are stored as (one section `<name>.weight` unless fused). out_dtype: of y, unless x's.
    """

    def __init__(
        self,
        context: ModelContext,
        name: str,
        in_features: int,
        out_features: int,
        mode: Mode,
        *,
        std: float,
        sections: Sequence[Section] | None = None,
        out_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layout = context.layout
        self.context, self.name, self.mode, self.out_dtype = context, name, mode, out_dtype
        sections = sections or [Section(f"{name}.weight", out_features)]
        size, rank = layout.tensor_size, layout.tensor_rank
        rows, columns = out_features, in_features
        outputs: tuple[tuple[int, int], ...] = ()
        inputs: tuple[tuple[int, int], ...] = ()
        if mode == "column":
            rows //= size
            pieces = split_sections(sections, (in_features,), rank, size)
            runs, start = [], 0
            for section in sections:
                runs.append((start + rank * (section.rows // size), section.rows // size))
                start += section.rows
            outputs = tuple(runs) if size > 1 else ()
        else:
            parts = split_sections(sections, (in_features,), 0, 1)
            if mode == "row":
                if in_features % size:
                    raise ValueError(f"{name} has {in_features} input features, which parallel.tensor={size} does not divide")
                columns //= size
                inputs = ((rank * columns, columns),) if size > 1 else ()
                parts = [Piece(p.name, p.shape, (p.offset[0], rank * columns), p.local) for p in parts]
            pieces = parts
        self.weight = sharded_parameter(context, (rows, columns), pieces, init.normal(std), SPREAD[mode])
        own_tokens = mode == "replicated" and layout.sequence_parallel
        self.site = context.site(name, outputs=outputs, inputs=inputs, own_tokens=own_tokens)
        context.linears.append(LinearUse(name, out_features, in_features, SPREAD[mode], 2.0 * in_features * out_features))

    def weights(self) -> list[tuple[Site, nn.Parameter]]:
        """The weight, [N, K], and what the numerics know of it."""
        return [(self.site, self.weight)]

    def forward(self, x: Tensor, microbatch: Microbatch, keys: TokenKeys | None = None) -> Tensor:
        """x [sequence, batch, in] -> [sequence, batch, out]; which dimension is local depends on the mode. keys: which tokens of the microbatch
        the rows of x are; None: all."""
        layout = self.context.layout
        if self.mode == "column" and layout.tensor_size > 1:
            if layout.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x)
        positions = microbatch.own_positions(layout) if self.mode == "replicated" else microbatch.positions
        y = linear(
            x,
            self.weight,
            self.context.policy.formats(self.name, microbatch.progress),
            self.site,
            microbatch.keys(positions) if keys is None else keys,
            microbatch.step,
            self.out_dtype,
            singly=microbatch.few,
        )
        if self.mode == "row" and layout.tensor_size > 1:
            if layout.sequence_parallel:
                y = mappings.reduce_scatter_to_sequence_parallel_region(y)
            else:
                y = mappings.reduce_from_tensor_model_parallel_region(y)
        return y
