"""Layouts in less than fp32: bf16 activations within what rounding explains, NVFP4 within what NVFP4 is from fp32 (`tests/layouts` says why)."""

from pathlib import Path
from typing import Any

import pytest

from tests.layouts import bf16, nvfp4
from tests.layouts.cases import Case, case
from tests.layouts.run import given, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_bf16_activations_move_a_loss_by_what_rounding_explains(_pool: Any, tmp_path: Path) -> None:
    overrides = (*given(tmp_path), *bf16.RUN)
    (bounds,) = _pool.run(1, bf16.bounds, overrides, timeout=600)
    (single,) = _pool.run(1, bf16.losses, overrides, 1, timeout=600)
    (exact,) = _pool.run(1, bf16.losses, (*overrides, "precision.compute=fp32"), 1, timeout=600)
    assert (
        max(abs(a - b) for one, other in zip(single, exact, strict=True) for a, b in zip(one, other, strict=True)) > 1e-6
    )  # it was rounded
    for layout in bf16.CASES:
        for losses in _pool.run(layout.ranks, bf16.losses, (*overrides, *layout.overrides), layout.ranks, timeout=600):
            for step, (ours, theirs, limits) in enumerate(zip(losses, single, bounds, strict=True)):
                for loss, expected, limit in zip(ours, theirs, limits, strict=True):
                    assert abs(loss - expected) <= limit < 1e-3 * expected, f"{layout.name}, step {step}"


@pytest.fixture(scope="module")
def quantised(_pool: Any, tmp_path_factory: pytest.TempPathFactory) -> nvfp4.Quantised:
    return nvfp4.Quantised(_pool, tmp_path_factory.mktemp("nvfp4"))


@pytest.mark.parametrize("scope", nvfp4.SCOPES)
@pytest.mark.parametrize("layout", nvfp4.CASES, ids=lambda layout: f"{layout.ranks}: {layout.name}")
def test_a_layout_is_no_further_from_one_rank_than_nvfp4_from_fp32(layout: Case, scope: str, quantised: nvfp4.Quantised) -> None:
    assert quantised.measure(layout, scope)["problems"] == []


def test_split_sequences_give_the_losses_of_one_rank_in_nvfp4(_pool: Any, tmp_path: Path) -> None:
    """With amaxes over whole tensors every operand has the values and the random bits it has on one rank (routed experts apart, whose tokens come
    in another order)."""
    overrides = (
        *given(tmp_path),
        "precision=nvfp4",
        "precision.amax_scope=tensor_parallel",
        "model.pattern=M*-M/M",
        "model.ffn_hidden_size=64",
    )
    single, exact = (_pool.run(1, train, (*overrides, *more), False, 1, timeout=200)[0].metrics for more in ((), ("precision=fp32",)))
    for outcome in _pool.run(2, train, (*overrides, *case(2, context=2).overrides), False, 1, timeout=200):
        assert outcome.differing == []
        for key in ("loss/lm", "loss/mtp_1", "grad_norm"):
            assert outcome.metrics[0][key] == pytest.approx(single[0][key], rel=2e-6)
    assert abs(exact[0]["grad_norm"] - single[0]["grad_norm"]) > 1e-4  # it was quantised
