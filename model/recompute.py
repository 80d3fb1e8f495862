"""Activation recomputation: what the backward pass needs of the forward pass is computed again instead of kept.

    whole      a piece of the model keeps its inputs alone; its forward pass runs again, collectives included, when its gradient is asked for
    dropped    an output that is cheap to make is not kept by what reads it, but made again from its inputs; what reads it is not repeated

`parallel.recompute` names the kinds of pieces. A repeated pass gives the same bits: random bits depend on where an element is (Philox), router biases
move between steps, and quantised weights are the step's. What must happen once a microbatch asks `repeating`; what the host was told before,
`once` remembers.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint


class Recompute:
    """kinds: of the pieces that are computed again. repeating: a forward pass runs for the second time."""

    def __init__(self, kinds: Sequence[str] = ()) -> None:
        self.kinds = frozenset(kinds)
        self.repeating = False
        self._inside = False
        self._told: deque[Any] | None = None

    def wanted(self, kind: str) -> bool:
        """Whether a piece of this kind is to keep less now. Inside another one it is not: that keeps nothing anyway."""
        return kind in self.kinds and torch.is_grad_enabled() and not self._inside

    def whole(self, kind: str, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs), of which only `inputs` are kept if this kind is computed again."""
        if not self.wanted(kind):
            return function(*inputs)
        return checkpoint(self._alone, function, *inputs, use_reentrant=False, context_fn=partial(self._contexts, deque()))

    def once(self, ask: Callable[[], Any]) -> Any:
        """ask(), or, where a forward pass runs for the second time, what it gave in the first: for what makes the host wait for the device."""
        if self._told is None:
            return ask()
        if self.repeating:
            return self._told.popleft()
        answer = ask()
        self._told.append(answer)
        return answer

    @contextmanager
    def dropped(self, kind: str, function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[Tensor]:
        """function(*inputs), a tensor in memory of its own; what is called inside the `with` block keeps nothing of it."""
        if not self.wanted(kind):
            yield function(*inputs)
            return
        y = self.whole(kind, function, *inputs)
        again = _Again(function, inputs)
        memory = StorageWeakRef(y.untyped_storage())

        def pack(kept: Tensor) -> Any:
            if StorageWeakRef(kept.untyped_storage()) != memory:
                return kept
            return again, kept.shape, kept.stride(), kept.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            source, shape, stride, offset = packed
            return source().as_strided(shape, stride, offset)

        with saved_tensors_hooks(pack, unpack):
            yield y

    def _alone(self, function: Callable[..., Any], *inputs: Any) -> Any:
        self._inside = True
        try:
            return function(*inputs)
        finally:
            self._inside = False

    def _contexts(self, told: deque[Any]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return self._pass(told, repeating=False), self._pass(told, repeating=True)

    @contextmanager
    def _pass(self, told: deque[Any], *, repeating: bool) -> Iterator[None]:
        self.repeating, self._told = repeating, told
        try:
            yield
        finally:
            self.repeating, self._told = False, None


class _Again:
    """function(*inputs), made when first asked for."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.function, self.inputs = function, tuple(value.detach() for value in inputs)
        self.made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.function(*self.inputs)
        return self.made
