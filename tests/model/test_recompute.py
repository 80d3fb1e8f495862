"""What lives from a forward to a backward pass, with and without recomputation."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.activations import PARTS, left_behind, model_of, pieces
from model.recompute import Recompute
from tests.train.recipes import SMALL

TOKENS = 64
RUN = (*SMALL, "model.pattern=M*-E/*E", "model.ffn_hidden_size=64", "model.hidden_size=64", "train.micro_batch_size=1")


@pytest.fixture(scope="module", params=["nvfp4", "bf16"])
def left(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, tuple[str, ...]], float]]:
    """Bytes a token leaves behind, by kind of layer and by what is computed again."""
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    with model_of("tiny", *RUN, f"precision={request.param}", "precision.compute=bf16") as (model, context):
        for kind, forward in pieces(model, context, TOKENS).items():
            forward()
            for kinds in ((), ("norm",), ("moe",), ("mamba",), ("head",), PARTS, ("layer",)):
                context.recompute = Recompute(kinds)
                found[kind, kinds] = left_behind(forward) / TOKENS
    yield found


def test_each_kind_frees_what_it_names(left: dict[tuple[str, tuple[str, ...]], float]) -> None:
    hidden = 64
    for kind in ("Mamba-2", "attention", "MLP", "MoE"):
        whole = left[kind, ()]
        # The norm's copy in fp32; the layer's input, which somebody else made, is kept instead.
        assert left[kind, ("norm",)] <= whole - 4 * hidden
        # Nothing but a handful of numbers for each layer.
        assert left[kind, ("layer",)] * TOKENS < 4096
    norm = left["MoE", ()] - left["MoE", ("norm",)]
    assert left["MoE", ("moe",)] - norm < 0.1 * left["MoE", ()]
    assert left["Mamba-2", ("mamba",)] < 0.35 * left["Mamba-2", ()]
    assert left["head", ("head",)] * TOKENS < 4096 < left["head", ()] * TOKENS
    # All parts of a MoE layer together keep next to nothing of it.
    assert left["MoE", PARTS] * TOKENS < 4096


def test_a_dropped_output_is_made_again_once() -> None:
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return 2 * x

    x, w = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    for kinds in ((), ("norm",)):
        calls.clear()
        x.grad = w.grad = None
        with Recompute(kinds).dropped("norm", double, x) as y:
            out = (y * w).sum() + (y.view(2, 4)[1] * w[:4]).sum()
        out.backward()
        assert x.grad is not None and w.grad is not None
        expected = 2 * w.detach()
        expected[4:] += 2 * w.detach()[:4]
        torch.testing.assert_close(x.grad, expected)
        expected = 2 * x.detach()
        expected[:4] += 2 * x.detach()[4:]
        torch.testing.assert_close(w.grad, expected)
        # Forward; for what read it; `double` itself kept nothing it would need.
        assert len(calls) <= (3 if kinds else 1)
