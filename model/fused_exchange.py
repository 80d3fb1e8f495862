"""Tokens to the ranks of their experts by DeepEP's kernels (deep_ep, an optional package for GPUs), behind the functions that Megatron wraps them in.

    deepep      a token goes once to each rank that has any of its experts, and comes back as one row, which this rank has added up in fp32
    hybridep    the same, with the rows of experts made and added up by the kernels as well

Both take bf16 alone. The ranks' rows of a token are added up by the kernels, in fp32 and, as their source has it, in the order of the ranks.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence

import torch
from megatron.core.transformer.moe import fused_a2a
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from model.dispatch import Places, chosen, gather, spread
from model.exchange import Exchange, Visit

COLUMNS = 16
"""Rows are sent in widths that are multiples of it: DeepEP copies 16 bytes at a time, HybridEP's copies need 32."""


class DeepEP:
    def __init__(self, own: Sequence[int], experts: int, top_k: int, group: ProcessGroup) -> None:
        """own: experts of this rank, consecutive, of so many, of which every token visits top_k; group: the ranks that share them out, in the order
        of their experts."""
        self.experts, self.top_k, self.group = experts, top_k, group

    def __call__(self, tokens: Tensor, routing: Tensor, weights: Tensor) -> Visit:
        visited = routing.nonzero_static(size=len(routing) * self.top_k)[:, 1].contiguous().view(-1, self.top_k)
        received, here, here_weights, counted, handle = fused_a2a.fused_dispatch(
            _padded(tokens), visited, weights.gather(1, visited).float(), self.experts, self.group
        )
        counts = counted.tolist()
        places, visits = Places.of_some(here, sum(counts))

        def back(out: Tensor) -> Tensor:
            width = out.shape[1]
            summed, _ = fused_a2a.fused_combine(gather(_padded(out), places), self.group, handle)
            return summed[:, :width]

        return Visit(spread(received, places), counts, chosen(here_weights.flatten(), visits), back)


class HybridEP:
    def __init__(self, own: Sequence[int], experts: int, top_k: int, group: ProcessGroup) -> None:
        """As of `DeepEP`."""
        self.own, self.group = own, group

    def __call__(self, tokens: Tensor, routing: Tensor, weights: Tensor) -> Visit:
        rows, row_weights, _, counted, handle = fused_a2a.hybrid_ep_dispatch(
            x=_padded(tokens), routing_map=routing, probs=weights.float(), group=self.group, num_local_experts=len(self.own)
        )
        counts = counted.tolist()

        def back(out: Tensor) -> Tensor:
            width = out.shape[1]
            summed = fused_a2a.hybrid_ep_combine(x=_padded(out), handle=handle, num_permuted_tokens=sum(counts), pad_multiple=None)
            return summed[:, :width]

        return Visit(rows, counts, row_weights, back)


FUSED: Mapping[str, Callable[[Sequence[int], int, int, ProcessGroup], Exchange]] = {"deepep": DeepEP, "hybridep": HybridEP}
"""Values of `parallel.dispatcher` beside the all-to-all."""


def check_dispatcher(name: str, device: torch.device, compute: str) -> None:
    """Raises ValueError, in one sentence, where the dispatcher of this name cannot run. compute: the activations' dtype, `precision.compute`."""
    if name not in FUSED:
        return
    otherwise = "or parallel.dispatcher=alltoall"
    if device.type != "cuda":
        raise ValueError(
            f"parallel.dispatcher={name} sends tokens by kernels for NVIDIA GPUs, and there is none here: use one, {otherwise}"
        )
    if compute != "bf16":
        raise ValueError(
            f"parallel.dispatcher={name} sends bf16 alone, but precision.compute={compute}: use precision.compute=bf16, {otherwise}"
        )
    if importlib.util.find_spec("deep_ep") is None:
        raise ValueError(f"parallel.dispatcher={name} needs the package deep_ep, which is not installed: install DeepEP, {otherwise}")
    given = {"deepep": fused_a2a.fused_dispatch, "hybridep": fused_a2a.hybrid_ep_dispatch}[name]
    if given is None:
        raise ValueError(
            f"parallel.dispatcher={name} is not in the deep_ep that is installed: install the branch of DeepEP that has it (hybrid-ep has both), "
            f"{otherwise}"
        )


def _padded(rows: Tensor) -> Tensor:
    return functional.pad(rows, (0, -rows.shape[1] % COLUMNS)).contiguous()
