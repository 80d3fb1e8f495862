"""What is computed again has the same bits: losses, gradients, random rounding, router statistics, health, the weights afterwards."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from parallel import groups
from parallel.layout import ParallelConfig
from tests.train.recipes import recipe
from train import loop
from train.train_step import train_step

STEPS = 3
RUN = (
    "model.pattern=M*-EM/*E/*E",
    "model.ffn_hidden_size=64",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "data.reset_at_document=true",
    "model.router_aux_loss=0.01",
    "monitor.quantization.every=2",
)
KINDS: dict[str, str] = {kind: f"[{kind}]" for kind in ("norm", "activation", "moe", "head", "mamba", "layer")} | {
    "parts": "[norm,activation,moe,head,mamba]",
    "all": "[layer,norm,head]",
}


def train(rank: int, *overrides: str) -> tuple[list[dict[str, float]], str]:
    """Metrics of STEPS steps, and what all weights and optimizer state are at the end."""
    made = loop.build(recipe(*RUN, *overrides, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    try:
        metrics = [train_step(made, step) for step in range(STEPS)]
        digest = hashlib.sha256()
        for state in made.engine.parameter_states():
            for tensor in (state.param, *state.tensors.values()):
                digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return metrics, digest.hexdigest()
    finally:
        groups.shutdown(leave_world=False)


@pytest.fixture(scope="module")
def kept(_pool: Any) -> Any:
    """The run that keeps everything, by its overrides; each once."""
    known: dict[tuple[int, tuple[str, ...]], Any] = {}

    def of(world: int, *overrides: str) -> Any:
        if (world, overrides) not in known:
            known[world, overrides] = _pool.run(world, train, *overrides, timeout=250)
        return known[world, overrides]

    return of


def chosen(names: Iterable[str], always: tuple[str, ...]) -> list[Any]:
    """Parameters of a test, all but `always` slow."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", chosen(KINDS, ("parts", "all")))
def test_recomputing_changes_no_bit(name: str, kept: Any, ranks: Any) -> None:
    before = kept(1)
    assert ranks(1)(train, f"parallel.recompute={KINDS[name]}", timeout=250) == before
    metrics = before[0][0][1]
    assert metrics["moe/aux_loss"] > 0 and any(key.endswith("/sqnr_db") for key in metrics)


TENSOR, PIPELINE = ("precision.nvfp4.weight_scaling=1d", "parallel.tensor=2", "parallel.expert=2"), ("parallel.pipeline=2",)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "layout",
    [TENSOR, PIPELINE, pytest.param(TENSOR[:2], marks=SLOW), pytest.param(("parallel.distributed_optimizer=true",), marks=SLOW)],
    ids=" ".join,
)
@pytest.mark.parametrize("name", chosen(("parts", "all"), ("parts",)))
def test_nor_on_several_ranks(name: str, layout: tuple[str, ...], kept: Any, ranks: Any) -> None:
    assert ranks(2)(train, *layout, f"parallel.recompute={KINDS[name]}", timeout=250) == kept(2, *layout)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "mxfp8"])
def test_nor_in_another_precision(precision: str, kept: Any, ranks: Any) -> None:
    asked = f"precision={precision}"
    assert ranks(1)(train, asked, f"parallel.recompute={KINDS['parts']}", timeout=250) == kept(1, asked)


def test_kinds_that_contain_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.recompute=\['moe', 'moe'\] names moe twice: name each kind once"):
        ParallelConfig(recompute=("moe", "moe")).validate(1)
    with pytest.raises(ValueError, match="names layer, which computes all of a layer again, and moe, which is part of one: leave moe out"):
        ParallelConfig(recompute=("layer", "moe")).validate(1)
    with pytest.raises(
        ValueError, match=r"parallel\.recompute\[0\]='attention' is unknown: use norm or activation or moe or head or mamba or layer"
    ):
        recipe("parallel.recompute=[attention]")
