"""Megatron's engine against plain PyTorch, and what is particular to it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.engine import ModelSizes
from parallel.engines import check_engine, open_engine, register_engine
from parallel.groups import initialize, shutdown
from parallel.layout import Layout, ParallelConfig
from parallel.megatron.engine import MegatronEngine, microbatch_group
from parallel.replicas import differing_replicas
from tests.parallel.toy import Toy, batch, train
from train.optimizer import OptimizerConfig, open_optimizer, optimizer_options

STEPS = 4


def config_of(name: str, clip: float) -> OptimizerConfig:
    return OptimizerConfig(1e-2, name, clip=clip, options={key: kind() for key, kind in optimizer_options().items()})


def open_toy(layout: Layout, name: str = "adamw", clip: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Toy, MegatronEngine]:
    model = Toy(dtype)
    engine = open_engine("megatron", [model], layout, ModelSizes(dtype, hidden_size=8), open_optimizer(config_of(name, clip)))
    assert isinstance(engine, MegatronEngine)
    return model, engine


def reference(name: str, clip: float) -> dict[str, Tensor]:
    """Weights after STEPS steps of torch's own optimizer; weight decay for tensors of more than one dimension."""
    model = Toy(torch.float32)
    config = config_of(name, clip)
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() == 1) == flat], "weight_decay": 0.0 if flat else 0.1}
        for flat in (False, True)
    ]
    if name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=config.betas, eps=config.eps)
        for step in range(STEPS):
            optimizer.zero_grad()
            sum(model(sample) for sample in batch(step)).backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    else:
        momentum = {p: torch.zeros_like(p) for p in model.parameters()}
        first, second = config.betas
        for step in range(STEPS):
            model.zero_grad()
            sum(model(sample) for sample in batch(step)).backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            with torch.no_grad():
                for p, m in momentum.items():
                    assert p.grad is not None
                    p.mul_(1 - 1e-2 * (0.1 if p.dim() > 1 else 0.0))
                    p.sub_(1e-2 * torch.sign(first * m + (1 - first) * p.grad))
                    m.mul_(second).add_(p.grad, alpha=1 - second)
    return {name: p.detach() for name, p in model.named_parameters()}


def weights_of(rank: int, sharded: bool, name: str, clip: float) -> dict[str, Tensor]:
    layout = initialize(ParallelConfig(distributed_optimizer=sharded), seed=0)
    try:
        model, engine = open_toy(layout, name, clip)
        train(engine, layout, range(STEPS))
        assert differing_replicas(model) == []
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    finally:
        shutdown(leave_world=False)


@pytest.mark.parametrize("clip", [1e6, 0.05])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_steps_are_those_of_plain_pytorch(ranks: Any, name: str, clip: float) -> None:
    expected = reference(name, clip)
    for sharded in (False, True):
        for weights in ranks(2)(weights_of, sharded, name, clip):
            for parameter, value in expected.items():
                torch.testing.assert_close(weights[parameter], value, rtol=0, atol=2e-6, msg=(parameter + ": {}").format)


def doubled(rank: int, sharded: bool, dtype: torch.dtype) -> bool:
    """Doubles two masters after two steps; whether their weights follow, everywhere, and the next step starts there."""
    layout = initialize(ParallelConfig(distributed_optimizer=sharded), seed=0)
    try:
        model, engine = open_toy(layout, dtype=dtype)
        train(engine, layout, range(2))
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        masters = [None if state.master is None else state.master.clone() for state in engine.parameter_states()]

        def double(master: Tensor) -> None:
            assert master.dtype == torch.float32 and master.dim() > 1
            master.mul_(2)

        engine.update_masters({model.fused: double, model.experts: double})

        def follows() -> bool:
            factor = {"fused": 2, "experts": 2, "norm": 1}
            return all(torch.equal(param, factor[name] * before[name]) for name, param in model.named_parameters())

        for state, master in zip(engine.parameter_states(), masters, strict=True):
            if state.master is not None and master is not None:  # not rounded to the weight's dtype on the way
                assert torch.equal(state.master, master * (1 if state.param is model.norm else 2))
        at_once = follows()
        train(engine, layout, range(2, 3), learning_rate=0.0)  # masters are copied to the weights again
        return at_once and follows() and differing_replicas(model) == []
    finally:
        shutdown(leave_world=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_masters_may_be_changed_after_a_step(ranks: Any, sharded: bool, dtype: torch.dtype) -> None:
    assert ranks(2)(doubled, sharded, dtype) == [True, True]


def timeouts(rank: int) -> set[float]:
    initialize(ParallelConfig(tensor=2, expert_tensor=2, pipeline=2, virtual_pipeline=2, timeout_minutes=0.25), seed=0)
    try:
        groups = [group for group in torch.distributed.distributed_c10d._world.pg_map if group is not torch.distributed.group.WORLD]
        assert len(groups) > 3  # those of this rank; the pool made the world
        # torch has no public way to ask
        return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    finally:
        shutdown(leave_world=False)


def test_the_timeout_reaches_every_group(ranks: Any) -> None:
    assert ranks(4)(timeouts) == [{15.0}] * 4


@pytest.mark.parametrize(("count", "stages", "group"), [(4, 2, 2), (5, 2, 3), (7, 3, 4), (8, 3, 4), (3, 3, 3), (5, 4, 5)])
def test_microbatches_of_a_part_come_in_groups_of_at_least_the_stages(count: int, stages: int, group: int) -> None:
    assert microbatch_group(count, stages) == group


def test_an_engine_is_chosen_by_name() -> None:
    with pytest.raises(ValueError, match=r"parallel.engine='fsdp' is not available: use parallel.engine=megatron or deepspeed"):
        check_engine(ParallelConfig(engine="fsdp"), "fp32")
    with pytest.raises(ValueError, match="there is an engine 'megatron' already"):
        register_engine("megatron", MegatronEngine, lambda config, compute: None)
