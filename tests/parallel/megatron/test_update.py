"""What the update costs: each thing once a step, no gradient of a weight's size beside main_grad, state where a fused optimizer wants it."""

from collections import Counter
from typing import Any

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron
from megatron.core.utils import local_multi_tensor_l2_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.precision.linear import linear
from parallel.groups import device_seed, initialize, shutdown
from parallel.layout import ParallelConfig
from tests.parallel.megatron.test_engine import config_of, open_toy
from tests.parallel.toy import train
from tests.precision.operands import BF16
from tests.precision.test_linear import STEP, keys, site
from train.optimizer import open_optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_prepared_and_normed_once_a_step(dtype: torch.dtype, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: Counter[int] = Counter()
    norms: list[int] = []

    def counted(method: Any) -> Any:
        def prepare(self: Any) -> bool:
            prepared[id(self)] += 1
            return bool(method(self))

        return prepare

    for cls in (megatron.MixedPrecisionOptimizer, megatron.FP32Optimizer):
        monkeypatch.setattr(cls, "prepare_grads", counted(cls.prepare_grads))
    norm = megatron.get_grad_norm_fp32

    def measured(grads: Any, **given: Any) -> Any:
        norms.append(len(grads))
        return norm(grads, **given)

    monkeypatch.setattr(megatron, "get_grad_norm_fp32", measured)
    layout = initialize(ParallelConfig(), seed=0)
    _, engine = open_toy(layout, dtype=dtype)
    train(engine, layout, range(3))
    assert prepared and set(prepared.values()) == {3}
    assert len(norms) == 3 * len(prepared) and sum(norms) == 3 * 3  # every one of the three parameters once


def test_the_norm_waits_for_the_device_once(alone: None) -> None:
    layout = initialize(ParallelConfig(), seed=0)
    open_toy(layout)
    norm: Any = clip_grads.l2_norm_impl
    assert norm is not local_multi_tensor_l2_norm
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 5), (7,), (2, 2, 2))]
    ours, theirs = (f(0, torch.zeros(1), [tensors], False)[0] for f in (norm, local_multi_tensor_l2_norm_on_cpu))
    assert torch.equal(ours, theirs)
    with Reads() as reads:
        norm(0, torch.zeros(1), [tensors], False)
    assert not reads.count


def local_multi_tensor_l2_norm_on_cpu(*given: Any) -> Any:
    return torch.stack([tensor.norm() for tensor in given[2][0]]).norm().reshape(1), None


class Reads(TorchDispatchMode):
    """Numbers the host asks the device for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Large(TorchDispatchMode):
    """Memory in bf16 of at least so many elements that was made inside."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        made = [each.untyped_storage() for each in tree_leaves(result) if isinstance(each, torch.Tensor) and each.dtype == torch.bfloat16]
        self.made += [str(func) for memory in made if memory.data_ptr() not in given and memory.nbytes() >= 2 * self.elements]
        return result


def test_no_gradient_of_the_weights_size_is_made_beside_main_grad() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 48, generator=generator).bfloat16().requires_grad_(), torch.randn(64, 48, generator=generator).bfloat16()
    w.requires_grad_().main_grad = torch.zeros(64, 48)  # type: ignore[attr-defined]
    hooked = []
    accumulate: Any = w.expand_as(w).grad_fn
    accumulate.next_functions[0][0].register_hook(lambda *_: hooked.append(w.grad is not None))
    y = linear(x, w, (BF16, BF16, BF16), site(), keys(4), STEP) + linear(2 * x, w, (BF16, BF16, BF16), site(), keys(4), STEP)
    with Large(w.numel()) as large:
        y.sum().backward()
    assert not large.made
    assert hooked == [True]  # as Megatron's, behind the last use of the weight
    expected = (torch.ones(4, 64).T @ (x.float() + 2 * x.float())).detach()
    torch.testing.assert_close(w.main_grad, expected, rtol=1e-6, atol=1e-5)  # type: ignore[attr-defined]


def test_adamws_state_lies_beside_its_masters_and_a_fused_one_takes_it() -> None:
    optimizer = open_optimizer(config_of("adamw", 1.0))
    assert {value.device.type for value in optimizer.room(torch.empty(3, device="meta")).values()} == {"meta"}
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    for param, roomy in zip(params, (True, False), strict=True):
        fused = torch.optim.AdamW([param], 1e-2, fused=True)
        if roomy:
            fused.state[param] = optimizer.room(param.detach())
        for step in range(2):
            param.grad = torch.full_like(param, step + 1.0)
            fused.step()
    assert torch.equal(*params)


def seeds(rank: int, parallel: ParallelConfig) -> tuple[int, int]:
    layout = initialize(parallel, seed=0)
    try:
        return device_seed(layout, 1), device_seed(layout, 2)
    finally:
        shutdown(leave_world=False)


def test_no_two_ranks_draw_the_same_rounding(ranks: Any) -> None:
    apart = ranks(4)(seeds, ParallelConfig(tensor=2, expert=2))
    assert len({seed for pair in apart for seed in pair}) == 8
    # Without sequence parallelism the ranks of a tensor group compute some things alike, and must stay equal.
    alike = [first for first, _ in ranks(4)(seeds, ParallelConfig(tensor=2, sequence=False))]
    assert alike[0] == alike[1] != alike[2] == alike[3]
