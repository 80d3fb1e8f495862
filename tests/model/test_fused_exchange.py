"""What stands before DeepEP's kernels, against the all-to-all. The kernels are imitated: of themselves this shows nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model.exchange import AllToAll, Exchange, Visit
from model.fused_exchange import FUSED, check_dispatcher
from parallel.layout import ParallelConfig
from tests.layouts.run import Outcome, given, train
from tests.model import deep_ep_imitated
from tests.model.build import open_context
from tests.model.test_moe import CONFIG

TOKENS, TOP_K, WIDTH = 17, 2, 28

Numbers = dict[str, Tensor]


def exchanges(experts: int, rank: int, context: Any) -> dict[str, Exchange]:
    local = experts // 2
    own = range(rank * local, (rank + 1) * local)
    fused = {name: make(own, experts, TOP_K, context.layout.groups.ep) for name, make in FUSED.items()}
    return {"alltoall": AllToAll(own, context.megatron, context.layout.groups, lambda ask: ask())} | fused


def on_rank(rank: int, experts: int, tokens: int) -> dict[str, Numbers]:
    """Of every exchange: what came to this rank's experts, what came back, and the gradients."""
    results: dict[str, Numbers] = {}
    with (
        open_context(ParallelConfig(expert=2), config=CONFIG.changed(experts=experts, top_k=TOP_K)) as context,
        deep_ep_imitated.installed(),
    ):
        for name, exchange in exchanges(experts, rank, context).items():
            draw = torch.Generator().manual_seed(rank)
            x = torch.randn(tokens, WIDTH, generator=draw).bfloat16().requires_grad_()
            scores = torch.rand(tokens, experts, generator=draw)
            routing = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(TOP_K).indices, True)
            weights = (scores * routing).requires_grad_()
            visit = exchange(x, routing, weights)
            back = visit.back((worked(visit, rank * experts // 2) * visit.weights.unsqueeze(1)).bfloat16())
            back.backward(torch.randn(tokens, WIDTH, generator=draw).bfloat16())
            assert x.grad is not None and weights.grad is not None
            results[name] = {
                "rows": arranged(visit),
                "counts": torch.tensor(visit.counts),
                "back": back.detach(),
                "gradient": x.grad,
                "weights' gradient": weights.grad,
            }
    return results


def worked(visit: Visit, first: int) -> Tensor:
    """What an expert makes of its rows: each something else."""
    factors = torch.arange(first + 1, first + 1 + len(visit.counts)).repeat_interleave(torch.tensor(visit.counts))
    return visit.rows[:, :WIDTH].float() * factors.unsqueeze(1)


def arranged(visit: Visit) -> Tensor:
    """The rows of each expert with their weights, in an order that does not depend on how they came."""
    whole = torch.cat((visit.rows[:, :WIDTH].float(), visit.weights.float().unsqueeze(1)), dim=1).detach()
    return torch.cat([part[part[:, 0].argsort(stable=True)] for part in whole.split(visit.counts)])


@pytest.mark.parametrize("experts", [2, 6])
@pytest.mark.parametrize("tokens", [TOKENS, 1])
def test_the_same_rows_come_to_experts_and_go_back(ranks: Callable[[int], Callable[..., list[Any]]], experts: int, tokens: int) -> None:
    for rank in ranks(2)(on_rank, experts, tokens):
        expected = rank.pop("alltoall")
        assert expected["back"].any() and expected["gradient"].any()
        for numbers in rank.values():
            for exact in ("rows", "counts"):
                assert torch.equal(numbers[exact], expected[exact])
            for name in ("back", "gradient"):
                if experts == 2:  # a row of each rank for each token: the same sums
                    assert torch.equal(numbers[name], expected[name])
                # A rank's sum is rounded to bf16 before it is sent, as a rank's rows are; sums of both are rounded once more.
                torch.testing.assert_close(numbers[name], expected[name], rtol=2**-7, atol=2**-7 * float(expected[name].abs().max()))
            torch.testing.assert_close(numbers["weights' gradient"], expected["weights' gradient"], rtol=2**-7, atol=2**-7)


def trained(rank: int, overrides: Sequence[str], imitate: bool) -> Outcome:
    patch = pytest.MonkeyPatch()
    patch.setattr("train.build.check_dispatcher", lambda *_: None)  # there is no GPU
    try:
        if not imitate:
            return train(rank, overrides, steps=4)
        with deep_ep_imitated.installed():
            return train(rank, overrides, steps=4)
    finally:
        patch.undo()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FUSED)
def test_a_run_gives_the_losses_of_the_all_to_all(name: str, ranks: Callable[[int], Callable[..., list[Any]]], tmp_path: Any) -> None:
    """Random bits included, whose keys travel with the tokens; and pieces computed again, which send them again."""
    overrides = (*given(tmp_path), "precision=nvfp4", "precision.compute=bf16", "parallel.expert=2")
    expected = ranks(2)(trained, overrides, False, timeout=280)[0]
    fused = ranks(2)(trained, (*overrides, f"parallel.dispatcher={name}", "parallel.recompute=[moe]"), True, timeout=280)[0]
    losses = [[step["loss/lm"] for step in outcome.metrics] for outcome in (expected, fused)]
    assert losses[0][0] > losses[0][-1]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2.5e-3, atol=0)


@pytest.mark.parametrize(
    ("device", "compute", "sentence"),
    [
        ("cpu", "bf16", "parallel.dispatcher=deepep sends tokens by kernels for NVIDIA GPUs, and there is none here"),
        ("cuda", "fp32", "parallel.dispatcher=deepep sends bf16 alone, but precision.compute=fp32"),
        ("cuda", "bf16", "parallel.dispatcher=deepep needs the package deep_ep, which is not installed"),
    ],
)
def test_where_it_cannot_run_a_sentence_says_so(device: str, compute: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}.*parallel.dispatcher=alltoall$"):
        check_dispatcher("deepep", torch.device(device), compute)
    check_dispatcher("alltoall", torch.device(device), compute)
