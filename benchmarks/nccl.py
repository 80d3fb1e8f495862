"""What NCCL takes, as torch's binding to it has it (ProcessGroupNCCL.cpp of torch 2.13): for machines where gloo, or nothing, stands in for it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TYPES = frozenset(
    (
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
)
LACKS = frozenset(("allgather_coalesced", "monitored_barrier", "recv_any_source", "recv_anysource"))
"""Methods of ProcessGroup, without underscores at their ends."""
BITWISE = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)


def objection(method: str, tensors: Sequence[Tensor], op: Any = None) -> str | None:
    """Why NCCL would refuse this collective, in words; None: it would not. Where tensors are is another question.

    method: of ProcessGroup, or its operator's name. op: of a reduction, as torch.distributed.ReduceOp has them.
    """
    method = method.strip("_")
    if method in LACKS:
        return f"NCCL has no {method}"
    if unknown := {each.dtype for each in tensors} - TYPES:
        return f"{method} of {unknown.pop()}, which NCCL does not know"
    if op is not None and op in BITWISE:
        return f"{method} by {op}, which NCCL does not have"
    if op is not None and any(each.dtype == torch.bool for each in tensors) and op == dist.ReduceOp.AVG:
        return f"{method} of booleans by {op}, which NCCL does not have"
    if not all(each.is_contiguous() for each in tensors):
        return f"{method} of a tensor that is not contiguous, which NCCL does not take"
    return None
