"""What the DeepSpeed engine does not do is said before anything starts, with or without the package."""

import pytest

from parallel.deepspeed import limits
from parallel.engines import check_engine
from parallel.layout import ParallelConfig
from tests.train.recipes import recipe
from train.recipe.reading import RecipeError


@pytest.mark.parametrize(
    ("ranks", "overrides", "sentence"),
    [
        (2, ("parallel.pipeline=2",), "parallel.pipeline=2 cannot be had with parallel.engine=deepspeed"),
        (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2"), "parallel.pipeline=2 cannot be had"),
        (2, ("parallel.context=2",), "parallel.context=2 cannot be had with parallel.engine=deepspeed"),
        (2, ("parallel.zero_stage=3", "parallel.tensor=2"), "parallel.tensor=2 cannot be had with parallel.zero_stage=3"),
        (2, ("parallel.zero_stage=3", "parallel.expert=2"), "parallel.expert=2 cannot be had with parallel.zero_stage=3"),
        (2, ("parallel.zero_stage=3", "parallel.expert_tensor=2"), "parallel.expert_tensor=2 cannot be had with parallel.zero_stage=3"),
        (2, ("parallel.zero_stage=4",), "parallel.zero_stage=4 is not available: use 1"),
        (2, ("parallel.zero_stage=0",), "parallel.zero_stage=0 is not available"),
        (2, ("parallel.distributed_optimizer=true",), "parallel.distributed_optimizer=true is Megatron's"),
        (2, ("parallel.overlap_grad_reduce=true",), "parallel.overlap_grad_reduce=true is Megatron's"),
        (1, ("precision.compute=bf16",), "precision.compute=bf16 cannot be had with parallel.engine=deepspeed"),
        (1, ("parallel.engine=megatron", "parallel.zero_stage=2"), "parallel.zero_stage=2 has no meaning with parallel.engine=megatron"),
        (1, ("parallel.engine=megatron", "parallel.offload_optimizer=true"), "parallel.offload_optimizer=true has no meaning"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(ranks: int, overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as refused:
        recipe("precision=fp32", "parallel.engine=deepspeed", *overrides, world_size=ranks)
    assert "\n" not in str(refused.value) and ": use " in str(refused.value)


def test_the_package_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"the package deepspeed, which is not installed: use pip install -c constraints.txt -e '\.\[deepspeed\]'"
    ):
        check_engine(ParallelConfig(engine="deepspeed"), "fp32")
    monkeypatch.setattr(limits, "find_spec", lambda name: object())
    check_engine(ParallelConfig(engine="deepspeed", tensor=2, expert=2, zero_stage=2, offload_optimizer=True), "fp32")
