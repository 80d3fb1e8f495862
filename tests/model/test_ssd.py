"""The chunked recurrence against the sequential one in fp64."""

import pytest
import torch

from model.ssd import chunked, recurrence


def arguments(length: int, heads: int = 4, groups: int = 2, width: int = 8, state: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(2, length, heads) - 2)
    a = -torch.exp(normal(heads))
    return [normal(2, length, heads, width), dt, a, normal(2, length, groups, state), normal(2, length, groups, state), normal(heads)]


def documents_of(length: int) -> torch.Tensor:
    boundaries = torch.zeros(2, length, dtype=torch.int32)
    boundaries[0, [5, 6, 64]] = 1
    boundaries[1, [63, 90]] = 1
    return boundaries.cumsum(1).int()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_every_gradient_equal_the_fp64_recurrence(length: int, chunk: int, packed: bool) -> None:
    if packed and length < 100:
        pytest.skip("the packed case needs room for its documents")
    documents = documents_of(length) if packed else None
    exact = [t.clone().requires_grad_() for t in arguments(length)]
    fast = [t.float().requires_grad_() for t in arguments(length)]
    expected = recurrence(*exact, documents)
    seed = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(seed)
    result = chunked(*fast, documents, chunk)
    result.backward(seed.float())
    for name, ours, theirs in zip(
        ("y", "x", "dt", "A", "B", "C", "D"), (result, *(t.grad for t in fast)), (expected, *(t.grad for t in exact)), strict=True
    ):
        assert ours is not None and theirs is not None
        error = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30)
        assert error <= 5e-6, f"{name}: {error:.2e}"


def test_packed_documents_equal_each_document_alone() -> None:
    args = arguments(120)
    documents = documents_of(120)
    together = chunked(*args, documents, 32)
    for row in range(2):
        for ordinal in documents[row].unique():
            where = documents[row] == ordinal
            alone = [t[row : row + 1, where] if t.dim() > 1 else t for t in args]
            torch.testing.assert_close(chunked(*alone, None, 32)[0], together[row, where])
