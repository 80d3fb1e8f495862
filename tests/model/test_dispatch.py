"""Rows of experts and tokens: sums in fp32, in one order, without atomics."""

from functools import reduce

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.dispatch import Places, gather, spread
from model.moe import MoE
from tests.model.build import disturb, microbatch, open_context
from tests.model.test_moe import BATCH, CONFIG, LENGTH, hidden

TOKENS, TOP_K, WIDTH = 40, 22, 24


def places(seed: int) -> Places:
    """Rows in an order of their own; each token's in the order of its experts."""
    order = torch.randperm(TOKENS * TOP_K, generator=torch.Generator().manual_seed(seed))
    rows = order.view(TOKENS, TOP_K)
    tokens = torch.empty(TOKENS * TOP_K, dtype=torch.int64)
    tokens[order] = torch.arange(TOKENS).repeat_interleave(TOP_K)
    return Places(tokens, rows)


def values(seed: int = 0) -> Tensor:
    """bf16 [tokens, top_k, width]."""
    return torch.randn(TOKENS, TOP_K, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16()


def laid_out(x: Tensor, where: Places) -> Tensor:
    result = x.new_empty(TOKENS * TOP_K, WIDTH)
    result[where.rows.flatten()] = x.flatten(0, 1)
    return result


def test_sums_do_not_depend_on_where_rows_lie() -> None:
    x, dy = values(), values(1)
    sums, gradients = [], []
    for seed in range(4):
        where = places(seed)
        sums.append(gather(laid_out(x, where), where))
        tokens = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        spread(tokens, where).backward(laid_out(dy, where))
        assert tokens.grad is not None
        gradients.append(tokens.grad)
    for several, of in ((sums, x), (gradients, dy)):
        assert all(torch.equal(one, several[0]) for one in several)
        exact = of.double().sum(1)
        # One rounding to bf16, and fp32's while adding.
        bound = exact.abs() * 2**-8 + of.double().abs().sum(1) * TOP_K * 2**-24
        assert ((several[0].double() - exact).abs() <= bound).all()
    forth, back = reduce(torch.add, x.unbind(1)), reduce(torch.add, reversed(x.unbind(1)))
    assert (forth != back).float().mean() > 0.5  # what one after another in bf16 would give


def test_spread_and_gather_are_each_others_gradient() -> None:
    where = places(3)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    rows = spread(x, where)
    assert torch.equal(rows, x.detach()[where.tokens])
    y = torch.randn(TOKENS * TOP_K, WIDTH, dtype=torch.float64)
    (inner,) = torch.autograd.grad(rows, x, y)
    torch.testing.assert_close((inner * x).sum(), (rows * y).sum(), rtol=1e-6, atol=0)
    again = y.clone().requires_grad_()
    (back,) = torch.autograd.grad(gather(again, where), again, x.detach())
    assert torch.equal(back, rows.detach())


class Atomics(TorchDispatchMode):
    """Operations that on a GPU would add several values into one place, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
        self.seen += name == "index_select"
        if name in ("index_add", "scatter_reduce", "index_reduce"):
            self.found.add(name)
        if name == "scatter_add":  # the gradient of a choice of different places adds nothing up
            _, dim, index, *_ = args
            if index.sort(dim).values.diff(dim=dim).eq(0).any():
                self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("latent", [16, None], ids=["latent", "full width"])
def test_a_mixture_of_experts_adds_nothing_with_atomics(latent: int | None) -> None:
    with open_context(config=CONFIG.changed(latent_size=latent)) as context, Atomics() as ops:
        layer = MoE(context, "layers.0.mixer").train()
        disturb(layer)
        x = hidden().requires_grad_()
        layer(x, microbatch(LENGTH, BATCH)).square().sum().backward()
    assert ops.seen and not ops.found
