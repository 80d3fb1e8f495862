"""Sequences split over ranks: layers and the recurrence give what they give for whole sequences, forward and backward."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from model.layer import Layer
from model.ssd import chunked, recurrence
from parallel import groups
from parallel.context import Scan, shift
from parallel.layout import ParallelConfig
from tests.model.build import CONFIG, disturb, microbatch, open_context, packed
from tests.model.test_ssd import REGIMES, arguments

LENGTH = 120  # 4 parts of 30 tokens, which chunks of 16 do not divide


def documents_of(length: int) -> Tensor:
    """Row 0: one document over three parts, borders of documents on borders of parts; row 1: short ones and the rest of one."""
    starts = torch.zeros(2, length, dtype=torch.int32)
    starts[0, [7, 90, 91]] = 1
    starts[1, [1, 29, 30, 60, 62, 118]] = 1
    return starts.cumsum(1).int()


def shifted(rank: int) -> list[list[float]]:
    layout = groups.initialize(ParallelConfig(context=4), 1)
    try:
        return [shift(torch.tensor([rank + 1.0]), by, layout.groups.cp).tolist() for by in (1, 3, -1, -2)]
    finally:
        groups.shutdown(leave_world=False)


def test_shift(ranks: Any) -> None:
    answers = torch.tensor(ranks(4)(shifted)).squeeze(-1).T  # by shift and rank
    assert answers.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [2, 3, 4, 0], [3, 4, 0, 0]]


CASES = [(regime, with_documents) for regime in REGIMES for with_documents in (False, True)]


def gradient() -> Tensor:
    """Of the recurrence's output."""
    return torch.randn(2, LENGTH, 4, 8, generator=torch.Generator().manual_seed(1))


def split_recurrences(rank: int) -> list[list[Tensor]]:
    """For every case this rank's part of the output and of the gradients, in fp32."""
    layout = groups.initialize(ParallelConfig(context=4), 1)
    results = []
    try:
        length = LENGTH // 4
        own = slice(rank * length, (rank + 1) * length)
        for regime, with_documents in CASES:
            inputs = [t.float() for t in arguments(LENGTH, regime)]
            parts = [(t[:, own] if t.dim() > 1 else t).clone().requires_grad_() for t in inputs]
            x, dt, a, b, c, d = parts
            documents = preceding = None
            if with_documents:
                whole = documents_of(LENGTH)
                documents, preceding = whole[:, own], whole[:, own.start - 1] if rank else torch.full((2,), -1)
            y = chunked(x, dt, a, b, c, d, documents, 16, Scan(layout.groups.cp), preceding)
            y.backward(gradient()[:, own])
            results.append([y.detach(), *(t.grad for t in parts if t.grad is not None)])
        return results
    finally:
        groups.shutdown(leave_world=False)


def test_states_handed_on_equal_the_fp64_recurrence_over_whole_sequences(ranks: Any) -> None:
    answers = ranks(4)(split_recurrences)
    for case, (regime, with_documents) in enumerate(CASES):
        exact = [t.clone().requires_grad_() for t in arguments(LENGTH, regime)]
        x, dt, a, b, c, d = exact
        expected = recurrence(x, dt, a, b, c, d, documents_of(LENGTH) if with_documents else None)
        expected.backward(gradient().double())
        for index, name in enumerate(("y", "x", "dt", "A", "B", "C", "D")):
            reference = exact[index - 1].grad if index else expected.detach()
            assert reference is not None
            parts = [answer[case][index].double() for answer in answers]
            value = torch.cat(parts, 1) if reference.dim() > 1 else torch.stack(parts).sum(0)
            for error in ((value - reference).norm() / reference.norm(), (value - reference).abs().max() / reference.abs().max()):
                assert error <= 5e-6, f"{regime}, documents {with_documents}, {name}: {error:.2e}"


ONE_GROUP = CONFIG.changed(mamba_groups=1, key_value_heads=1)
LAYERS = [(letter, config, whether) for letter, config in (("M", CONFIG), ("M", ONE_GROUP), ("*", CONFIG)) for whether in (False, True)]
Gradients = tuple[Tensor, Tensor, dict[str, Tensor]]


def through(rank: int, parallel: ParallelConfig) -> list[Gradients]:
    """For each of LAYERS this rank's part of its output and of its input's gradient, and the gradients of its weights."""
    results = []
    for letter, config, with_documents in LAYERS:
        with open_context(parallel, config=config) as context:
            layer = Layer(context, "layers.0", letter)
            disturb(layer)
            whole = microbatch(48, documents=packed(48) if with_documents else None)
            part = whole.part(context.layout.context_rank, context.layout.context_size)
            draw = torch.Generator().manual_seed(0)
            x, dy = (torch.randn(48, 2, config.hidden_size, generator=draw)[part.first :][: len(part.positions)] for _ in range(2))
            x.requires_grad_()
            y = layer(x, part)
            y.backward(dy)
            assert x.grad is not None
            results.append((y.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}))
    return results


@pytest.mark.parametrize(
    "way", ["state", pytest.param("all_to_all", marks=pytest.mark.slow)]
)  # by all-to-all 4 ranks are more than there are groups
def test_layers_on_parts_of_sequences_equal_the_whole(way: Literal["state", "all_to_all"], ranks: Any, alone: None) -> None:
    wholes = through(0, ParallelConfig())
    answers = ranks(4)(through, ParallelConfig(context=4, context_mamba=way))
    for index, (y, dx, grads) in enumerate(wholes):
        parts: list[Gradients] = [answer[index] for answer in answers]
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), dx, rtol=1e-5, atol=1e-5)
        for name, grad in grads.items():
            together = torch.stack([part[2][name] for part in parts]).sum(0)
            torch.testing.assert_close(together, grad, rtol=1e-5, atol=2e-5 * float(grad.abs().max()), msg=name)
