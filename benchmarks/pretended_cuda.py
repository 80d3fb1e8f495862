"""A CUDA device that is not there: tensors without memory that live on `cuda`, on a machine without a GPU and with a CPU build of torch.

Tensors on the device are fake (`torch._subclasses.fake_tensor`): they have shapes, strides and types and no values, and an operation between
one of them and a tensor elsewhere raises, as it would on a GPU. Tensors on the host are ordinary. What a host asks of the device is made up:
an even load where it asks how many rows go to which expert, otherwise what was copied there, or ones.

    DEVICE.pretend()            from here on this process has a GPU; there is no way back
    with DEVICE.running(...):   what runs inside is told, operation by operation, to an `Observer`

Autograd asks every tensor's device for its streams, which a CPU build of torch does not know of a CUDA device. `pretended_cuda.cpp` answers; a C++
compiler makes it once, into the user's cache.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.nccl import objection
from model.precision.backends.triton import Triton

SOURCE = Path(__file__).with_suffix(".cpp")
REMEMBERED = 64  # elements of a copied tensor whose values are remembered
CAPABILITY = (9, 0)

aten = torch.ops.aten


class Observer(Protocol):
    """What is told of the device's work."""

    def launch(self, name: str, read: list[Tensor], written: list[Tensor], flops: float, dtype: torch.dtype) -> None:
        """One operation. flops: of matrix products, on operands of dtype."""
        ...

    def wait(self, reason: str) -> None:
        """The host waits for the device."""
        ...

    def made(self, tensor: Tensor) -> None:
        """A tensor on the device."""
        ...


def compiler() -> str | None:
    """The C++ compiler of this machine, if it has one: CXX, or the first that is found."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _compiled() -> Path:
    source = SOURCE.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nibble"
    library = cache / f"pretended_cuda-{hashlib.sha256(source + torch.__version__.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    if (command := compiler()) is None:
        raise RuntimeError("pretending a GPU needs a C++ compiler once: install g++ or clang++, or say in CXX where one is")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        made = Path(directory, library.name)
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        arguments = ["-std=c++20", "-O0", "-shared", "-fPIC", *include, str(SOURCE), "-o", str(made), *libraries, "-lc10", "-ltorch_cpu"]
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"{command} could not compile {SOURCE}:\n{done.stderr}")
        made.replace(library)
    return library


class _Fakes(FakeTensorMode):
    # torch.tensor(..., device="cuda") then copies from the host by an operation that can be seen.
    avoid_device_init = True  # type: ignore[assignment]


@dataclass(frozen=True)
class _Schema:
    """What is known of an operation before it runs. outputs: keyword arguments that are written only; overwrites: its first argument too."""

    name: str
    free: bool
    outputs: frozenset[str]
    overwrites: bool


NOTHING_RUNS = frozenset(
    ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift", "lift_fresh", "set_", "resize_")
)
OVERWRITE = frozenset(("copy_", "fill_", "zero_"))


class Device(TorchDispatchMode):
    """The device, and the host beside it."""

    def __init__(self) -> None:
        super().__init__()
        self._fakes: _Fakes | None = None
        self._observer: Observer | None = None
        self._rows = 1
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._schemas: dict[Any, _Schema] = {}

    # -- pretending ------------------------------------------------------------------------------------------------------------------------

    def pretend(self) -> None:
        """Raises RuntimeError, in one sentence, where there is a GPU, or no C++ compiler that has not been needed before."""
        if self._fakes is not None:
            return
        if torch.cuda.is_available():
            raise RuntimeError("this machine has a GPU: there is nothing to pretend")
        ctypes.CDLL(str(_compiled()), mode=ctypes.RTLD_GLOBAL)
        for name, function in self._cuda_functions().items():
            getattr(torch.cuda, name)
            setattr(torch.cuda, name, function)
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign, assignment]
        dist.all_gather_object = self._all_gather_object  # type: ignore[assignment]
        Triton.launch = staticmethod(self._triton)  # type: ignore[method-assign]
        torch.autograd.set_multithreading_enabled(False)
        self._fakes = _Fakes(allow_non_fake_inputs=True)

    def _cuda_functions(self) -> dict[str, Callable[..., Any]]:
        stream = _Stream(self)
        return {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "device": lambda device: nullcontext(),
            "get_device_capability": lambda device=None: CAPABILITY,
            "Stream": lambda *_, **__: stream,
            "current_stream": lambda device=None: stream,
            "stream": lambda stream: nullcontext(),
            "Event": lambda *_, **__: stream,
            "synchronize": lambda device=None: self.wait("torch.cuda.synchronize"),
        }

    @contextmanager
    def running(self, observer: Observer, rows: int) -> Iterator[None]:
        """rows: of a microbatch that this rank sends to experts, tokens times top_k."""
        assert self._fakes is not None
        self._observer, self._rows = observer, rows
        try:
            with self._fakes, self, _Attention():
                yield
        finally:
            self._observer = None

    def wait(self, reason: str) -> None:
        """The host waits for the device."""
        if self._observer is not None:
            self._observer.wait(reason)

    # -- operations ------------------------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func.namespace == "c10d":
            self._allowed(func.__name__.split(".")[0], given)
        target = kwargs.get("device")
        if not any(each.is_cuda for each in given) and (target is None or torch.device(target).type != "cuda"):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func.namespace == "prim":  # a question about a tensor, as for its device
            return func(*args, **kwargs)
        schema = self._schema(func)
        if schema.name == "record_stream":
            return None
        if (asked := ASKING.get(schema.name)) is not None:
            answer = asked(self, *args, **kwargs)
            if answer is not NotImplemented:
                return answer
        if schema.name == "copy_" and not args[0].is_cuda:
            return self._to_host_copy(*args, **kwargs)
        if schema.name in ("_to_copy", "copy_"):
            self._from_host(given, args, kwargs)
        result = self._collective(func, args) if func.namespace == "c10d" else func(*args, **kwargs)
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.is_cuda]
        observer = self._observer
        if observer is None:
            return result
        for each in made:
            observer.made(each)
        if schema.name == "_to_copy" and not given[0].is_cuda and given[0].numel() <= REMEMBERED:
            with _disable_current_modes():
                self._known[made[0]] = (given[0].clone(), made[0]._version)
        if not schema.free:
            read = [each for each in tree_leaves(args[1:] if schema.overwrites else args) if isinstance(each, Tensor)]
            read += [
                each
                for key, value in kwargs.items()
                if key not in schema.outputs
                for each in tree_leaves(value)
                if isinstance(each, Tensor)
            ]
            flops, dtype = _products(schema.name, given)
            observer.launch(schema.name, read, made, flops, dtype)
        return result

    @staticmethod
    def _allowed(name: str, tensors: list[Tensor]) -> None:
        """Raises RuntimeError where NCCL would."""
        if name.startswith("barrier"):  # its tensor is a formality
            return
        elsewhere = next((each.device for each in tensors if not each.is_cuda), None)
        reason = objection(name, tensors) or (f"{name} of a tensor on {elsewhere}, where NCCL is not" if elsewhere else None)
        if reason is not None:
            raise RuntimeError(reason)

    @staticmethod
    def _collective(func: Any, args: Any) -> Any:
        """Nothing is sent: results are what there was room for, in the first argument, and work that is done."""
        done = [FakeWork().boxed() if "Work" in str(each.type) else args[0] for each in func._schema.returns]
        return done[0] if len(done) == 1 else tuple(done)

    def _schema(self, func: Any) -> _Schema:
        if func not in self._schemas:
            schema = func._schema
            name = schema.name.split("::")[1]
            view = any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
            outputs = frozenset(each.name for each in schema.arguments if each.is_out)
            self._schemas[func] = _Schema(name, view or name in NOTHING_RUNS, outputs, name in OVERWRITE)
        return self._schemas[func]

    # -- what the host asks ------------------------------------------------------------------------------------------------------------------

    def _value(self, tensor: Tensor) -> Tensor:
        """Made up, on the host."""
        known, version = self._known.get(tensor, (None, None))
        with _disable_current_modes():
            if known is not None and version == tensor._version:
                return known.to(tensor.dtype).view(tensor.shape)
            if tensor.dtype in (torch.int64, torch.int32) and tensor.dim():
                count = tensor.numel()
                even = torch.arange(count) < self._rows % max(count, 1)
                return (even + self._rows // max(count, 1)).to(tensor.dtype).view(tensor.shape)
            return torch.ones(tensor.shape, dtype=tensor.dtype)

    def _item(self, tensor: Tensor) -> Any:
        self.wait("item")
        value = self._value(tensor)
        with _disable_current_modes():
            return value.item()

    def _to_host(self, tensor: Tensor, **wanted: Any) -> Any:
        target = wanted.get("device")
        if not tensor.is_cuda or target is None or torch.device(target).type == "cuda":
            return NotImplemented
        if not wanted.get("non_blocking"):
            self.wait("copy to the host")
        value = self._value(tensor)
        with _disable_current_modes():
            return value.to(wanted.get("dtype") or value.dtype)

    def _to_host_copy(self, into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking:
            self.wait("copy to the host")
        value = self._value(source)
        with _disable_current_modes():
            return into.copy_(value)

    def _from_host(self, given: list[Tensor], args: Any, kwargs: Any) -> None:
        non_blocking = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
        if not given[-1].is_cuda and given[-1].numel() and not non_blocking:
            self.wait("copy from the host")

    def _masked_select(self, tensor: Tensor, mask: Tensor) -> Tensor:
        self.wait("masked_select")
        return self._sized(tensor, mask, rows=self._rows)

    def _index(self, tensor: Tensor, indices: list[Tensor | None]) -> Any:
        if len(indices) != 1 or indices[0] is None or indices[0].dtype != torch.bool:
            return NotImplemented
        self.wait("index by a mask")
        return self._sized(tensor, indices[0], rows=indices[0].numel(), trailing=tensor.shape[indices[0].dim() :])

    def _repeat_interleave(self, repeats: Tensor, *, output_size: int | None = None) -> Tensor:
        if output_size is None:
            self.wait("repeat_interleave")
            value = self._value(repeats)
            with _disable_current_modes():
                output_size = int(value.sum())
        return self._sized(repeats, rows=output_size, dtype=torch.int64)

    def _bincount(self, tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
        self.wait("bincount")
        return self._sized(tensor, rows=minlength, dtype=torch.int64)

    def _nonzero_static(self, tensor: Tensor, *, size: int, fill_value: int = -1) -> Tensor:
        return self._sized(tensor, rows=size, trailing=(tensor.dim(),), dtype=torch.int64)

    def _sized(self, *read: Tensor, rows: int, trailing: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> Tensor:
        """The result of an operation whose size depends on values."""
        assert self._fakes is not None
        with self._fakes:
            result = torch.empty((rows, *trailing), dtype=dtype or read[0].dtype, device=read[0].device)
        if self._observer is not None:
            self._observer.made(result)
            self._observer.launch("sized by values", list(read), [result], 0.0, result.dtype)
        return result

    # -- what would run elsewhere --------------------------------------------------------------------------------------------------------------

    def _triton(self, kernel: Any, x: Tensor, arguments: tuple[Any, ...], **ignored: Any) -> None:
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        if wrong := [each.device for each in tensors if each.device != x.device]:
            raise RuntimeError(f"the kernel {kernel.__name__} works on {x.device} and was given a tensor on {wrong[0]}")
        if self._observer is not None:
            self._observer.launch(kernel.__name__, tensors, [], 0.0, x.dtype)

    def _all_gather_object(self, everyone: list[Any], mine: Any, group: Any = None) -> None:
        self.wait("all_gather_object")
        everyone[:] = [mine] * len(everyone)


ASKING: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": Device._item,
    "_to_copy": Device._to_host,
    "masked_select": Device._masked_select,
    "index": Device._index,
    "repeat_interleave": Device._repeat_interleave,
    "bincount": Device._bincount,
    "nonzero_static": Device._nonzero_static,
}
"""Operations whose result, or its size, depends on values."""


def _products(name: str, given: list[Tensor]) -> tuple[float, torch.dtype]:
    """FLOPs and the operands' type of a matrix product, 0 for anything else."""
    if name in ("mm", "bmm"):
        return 2.0 * given[0].numel() * given[1].shape[-1], given[0].dtype
    if name in ("addmm", "baddbmm"):
        return 2.0 * given[1].numel() * given[2].shape[-1], given[1].dtype
    if "attention" in name or "attn" in name:
        # [..., heads, D] or, of packed documents, [tokens, heads, D]; causal; the backward pass has five products instead of two
        backward = "backward" in name
        query, key = (given[1], given[2]) if backward else (given[0], given[1])
        pairs = query.shape[-2] * key.shape[-2] if query.dim() == 4 else query.shape[0] ** 2
        heads = query.shape[0] * query.shape[1] if query.dim() == 4 else query.shape[1]
        return (10.0 if backward else 4.0) * heads * pairs * query.shape[-1] / 2, query.dtype
    return 0.0, given[0].dtype if given else torch.float32


class _Attention(TorchFunctionMode):
    """scaled_dot_product_attention by the kernel that a GPU would choose, of which a CPU build of torch knows the shapes alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not args[0].is_cuda:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
        if mask is None and query.dtype in (torch.bfloat16, torch.float16):
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)[0]
        if not kwargs.get("enable_gqa"):
            grad = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
            bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
            return aten._scaled_dot_product_efficient_attention(query, key, value, bias, grad, 0.0, causal)[0]
        return func(*args, **kwargs)


class _Stream:
    """A stream or an event. Waiting for it on the host is seen."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def synchronize(self) -> None:
        self._device.wait("an event")


DEVICE = Device()
"""Of this process."""


def place(root: Path) -> str:
    """file:line of the innermost frame of the product or of Megatron, for a person."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "site-packages/megatron" in name:
            return f"{name.split('site-packages/')[1]}:{frame.f_lineno}"
        if name.startswith(f"{root}/") and "benchmarks" not in name and "site-packages" not in name:
            return f"{name.removeprefix(f'{root}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
