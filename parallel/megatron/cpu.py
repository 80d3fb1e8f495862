"""Megatron-core (0.16.1, 0.19.2) without CUDA: every patch it needs, in one place, applied only where there is no CUDA device.

Megatron asks `torch.cuda` for the current device and for streams, and writes `device="cuda"` in a few places. Each patch below replaces
one such name; a test checks that all of them still exist in the pinned version. Nothing here is on the path of a CUDA machine.
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor

# Modules that allocate a handful of scalars with a literal device="cuda" (a token count, a norm, an overflow flag).
LITERAL_CUDA = (
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.utils",
)


class _Stream:
    """A stream of a device that has only one order of execution: nothing to wait for. All of them are one."""

    _only: "_Stream | None" = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Stream":
        cls._only = cls._only or super().__new__(cls)
        return cls._only

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def synchronize(self) -> None: ...


# torch.cuda functions Megatron calls unconditionally, and what they mean on a CPU.
CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {
    # mappings.py, p2p_communication.py and the optimizers allocate on torch.cuda.current_device()
    "current_device": lambda: torch.device("cpu"),
    # p2p_communication.py and parallel_state.py synchronise around point-to-point transfers
    "synchronize": lambda device=None: None,
    # token_dispatcher.py moves split sizes to the host on a side stream
    "Stream": _Stream,
    "current_stream": lambda device=None: _Stream(),
    "stream": lambda stream: nullcontext(),
    # schedules.py and param_and_grad_buffer.py mark ranges for a CUDA profiler through torch.cuda.nvtx; those fail softly already
}


class TorchOnCpu:
    """The torch module as seen by a module of `LITERAL_CUDA`: factories asked for device="cuda" allocate on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def on_cpu(*args: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return make(*args, **kwargs)

        return on_cpu


for _name in ("tensor", "zeros", "ones", "empty"):
    setattr(TorchOnCpu, _name, staticmethod(TorchOnCpu._factory(getattr(torch, _name))))


def clip_by_norm(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    """Megatron's clip, whose own version asserts the type string `torch.cuda.FloatTensor` (clip_grads.py:167)."""
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    attribute = "decoupled_grad" if use_decoupled_grad else "grad"
    grads = [grad for p in parameters if (grad := getattr(p, attribute, None)) is not None]
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient < 1.0 and grads:
        torch._foreach_mul_(grads, coefficient)


def as_cuda_type(param: Tensor) -> None:
    """Lets a CPU parameter answer `.type()` as its CUDA twin would: both mixed-precision optimizers sort parameters by that string."""
    names = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
    param.type = lambda: names[param.dtype]  # type: ignore[method-assign, assignment]


def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's maybe_move_tensor_to_cpu, whose own version leaves split sizes of a CPU tensor as tensors, which gloo does not take."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def gather_parts(input_: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
    """Megatron's all-gather along the first dimension, which gloo only has for parts of one size: others go by its all-to-all."""
    if output_split_sizes is None or group.size() == 1:
        return _gather_equal(input_, group)
    output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
    copies = input_.repeat(group.size(), *(1 for _ in input_.shape[1:]))
    dist.all_to_all_single(output, copies, output_split_sizes, [len(input_)] * group.size(), group=group)
    return output


def reduce_scatter_parts(input_: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
    """Megatron's reduce-scatter along the first dimension, of which the same is true. Sums in the order of the ranks."""
    if input_split_sizes is None or group.size() == 1:
        return _reduce_scatter_equal(input_, group)
    own = input_split_sizes[group.rank()]
    parts = input_.new_empty(group.size(), own, *input_.shape[1:])
    dist.all_to_all_single(parts.flatten(0, 1), input_.contiguous(), [own] * group.size(), input_split_sizes, group=group)
    return parts.sum(0)


_gather_equal = mappings._gather_along_first_dim
_reduce_scatter_equal = mappings._reduce_scatter_along_first_dim

_groups: dict[tuple[int, ...], Any] = {}


def shared_group(ranks: Any = None, timeout: Any = None, **_: Any) -> Any:
    """Megatron's create_group, but one group for every purpose that has these ranks.

    Megatron makes some twenty, most of them equal. On a GPU that lets transfers overlap; with gloo each costs three threads that wake up a
    hundred times a second.
    """
    key = tuple(ranks)
    if key not in _groups:
        _groups[key] = dist.new_group(ranks=list(ranks), timeout=timeout)
    return _groups[key]


def forget_groups() -> None:
    """For `parallel.groups.shutdown`, which destroys them."""
    _groups.clear()


_applied = False


def apply() -> None:
    """Applies every patch, once. Raises AttributeError when the installed Megatron lacks a patched name."""
    global _applied
    if _applied or torch.cuda.is_available():
        return
    for name, replacement in CUDA_FUNCTIONS.items():
        getattr(torch.cuda, name)
        setattr(torch.cuda, name, replacement)
    view = TorchOnCpu()
    for path in LITERAL_CUDA:
        module = importlib.import_module(path)
        assert module.torch is torch
        module.torch = view  # type: ignore[attr-defined]
    optimizer = importlib.import_module("megatron.core.optimizer.optimizer")
    assert callable(optimizer.clip_grad_by_total_norm_fp32)
    optimizer.clip_grad_by_total_norm_fp32 = clip_by_norm  # type: ignore[attr-defined]
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    assert callable(dispatcher.maybe_move_tensor_to_cpu)
    dispatcher.maybe_move_tensor_to_cpu = on_host  # type: ignore[attr-defined]
    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = reduce_scatter_parts
    state = importlib.import_module("megatron.core.parallel_state")
    assert callable(state.create_group)
    state.create_group = shared_group  # type: ignore[attr-defined]
    _applied = True
