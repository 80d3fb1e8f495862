"""The chunked recurrence against the sequential one in fp64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from model.ssd import chunked, recurrence, ssd, stepped

BOUND = 5e-6
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# Steps and decays from barely moving to forgetting within a token; each makes dt from a normal variable, and A.
REGIMES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "initial": (lambda z: (0.01 * z.exp()).clamp(1e-3, 0.1), lambda z: -(8 * z.abs() + 1)),
    "moderate": (torch.nn.functional.softplus, lambda z: -z.exp()),
    "forgetful": (lambda z: torch.nn.functional.softplus(3 * z), lambda z: torch.full_like(z, -16.0)),
    "uneven": (lambda z: (3 * z - 3).exp(), lambda z: torch.full_like(z, -1.0)),
    "still": (lambda z: 1e-5 * z.exp(), lambda z: -z.exp()),
}


def arguments(length: int, regime: str = "initial", *, heads: int = 4, groups: int = 2, width: int = 8, state: int = 16) -> Inputs:
    """x, dt, A, B, C, D in fp64, representable in fp32."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    step, decay = REGIMES[regime]
    dt, a = step(normal(2, length, heads)), decay(normal(heads))
    b, c = normal(2, length, groups, state), normal(2, length, groups, state)
    return each((normal(2, length, heads, width), dt, a, b, c, normal(heads)), lambda t: t.float().double())


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    x, dt, a, b, c, d = map(change, inputs)
    return x, dt, a, b, c, d


def documents_of(length: int) -> Tensor:
    """Boundaries inside chunks, at their edges, one after another, and chunks without any."""
    boundaries = torch.zeros(2, length, dtype=torch.int32)
    boundaries[0, [5, 6, 64]] = 1
    boundaries[1, [63, 90]] = 1
    return boundaries.cumsum(1).int()


def check(function: Callable[..., Tensor], inputs: Inputs, documents: Tensor | None, device: str = "cpu") -> None:
    """Forward and every gradient, by norm and by largest element."""
    exact = each(inputs, lambda t: t.clone().requires_grad_())
    fast = each(inputs, lambda t: t.float().to(device).requires_grad_())
    expected = recurrence(*exact, documents)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(dy.double())
    result = function(*fast, documents if documents is None else documents.to(device))
    result.backward(dy.to(device))
    ours = (result, *(t.grad for t in fast))
    theirs = (expected, *(t.grad for t in exact))
    for name, value, reference in zip(("y", "x", "dt", "A", "B", "C", "D"), ours, theirs, strict=True):
        assert value is not None and reference is not None
        difference = value.detach().double().cpu() - reference
        for error in (difference.norm() / reference.norm(), difference.abs().max() / reference.abs().max()):
            assert error <= BOUND, f"{name}: {error:.2e}"


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_forward_and_every_gradient_equal_the_fp64_recurrence(regime: str, packed: bool) -> None:
    for length, chunk in ((128, 16), (150, 64), (200, 128)):
        documents = documents_of(length) if packed else None
        check(partial(chunked, chunk=chunk), arguments(length, regime), documents)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65])
def test_any_length(length: int) -> None:
    if length > 1:  # A has no effect on a single token
        check(partial(chunked, chunk=16), arguments(length), None)
    else:
        args = arguments(length)
        torch.testing.assert_close(chunked(*args, None, 16), recurrence(*args))


@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 1, 4), (4, 4, 8), (8, 2, 64)])
def test_heads_and_groups_through_the_device_choice(heads: int, groups: int, width: int) -> None:
    inputs = arguments(130, heads=heads, groups=groups, width=width)
    check(lambda *args: ssd(*args[:6], documents=args[6], chunk_size=128), inputs, documents_of(130))


def tokens(t: Tensor, row: int, where: Tensor) -> Tensor:
    return t[row : row + 1, where] if t.dim() > 1 else t


def test_packed_documents_equal_each_document_alone() -> None:
    args = arguments(120)
    documents = documents_of(120)
    together = chunked(*args, documents, 32)
    for row in range(2):
        for ordinal in documents[row].unique():
            where = documents[row] == ordinal
            alone = each(args, partial(tokens, row=row, where=where))
            torch.testing.assert_close(chunked(*alone, None, 32)[0], together[row, where])


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES)
def test_cuda_equals_the_fp64_recurrence(regime: str) -> None:
    function = lambda *args: ssd(*args[:6], documents=args[6], chunk_size=128)  # noqa: E731
    check(function, arguments(300, regime, state=64, width=32), documents_of(300), "cuda")


@pytest.mark.parametrize("regime", REGIMES)
def test_one_token_after_another_equals_the_fp64_recurrence(regime: str) -> None:
    exact = arguments(21, regime)
    expected = recurrence(*exact)
    x, dt, a, b, c, d = each(exact, lambda t: t.float())
    by_count = {}
    for count in (1, 3):
        state, found, left = None, [], []
        for start in range(0, 21, count):
            x_, dt_, b_, c_ = (t[:, start : start + count] for t in (x, dt, b, c))
            y, states = stepped(x_, dt_, a, b_, c_, d, state)
            state = states[-1]
            found.append(y)
            left += states[1:]
        by_count[count] = torch.cat(found, dim=1), left
    y = by_count[1][0].double()
    for error in ((y - expected).norm() / expected.norm(), (y - expected).abs().max() / expected.abs().max()):
        assert error <= BOUND
    # However many come together, every token gives the same, and leaves the same.
    assert torch.equal(by_count[1][0], by_count[3][0])
    assert all(torch.equal(one, three) for one, three in zip(by_count[1][1], by_count[3][1], strict=True))
