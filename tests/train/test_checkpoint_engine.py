"""The real engine, saved by one kind of data parallelism and resumed by another."""

from unittest.mock import patch

import pytest
import torch
from megatron.core.enums import ModelType
from torch import Tensor, nn

from parallel.engine import AdamW, Engine
from parallel.layout import Layout, ParallelConfig, initialize, shutdown
from parallel.megatron import transformer_config
from parallel.shards import Piece, set_pieces
from train.checkpoint.reader import open_checkpoint
from train.checkpoint.run import restore_run, save_run

SAMPLES = 4  # of a global batch, each a microbatch


class Toy(nn.Module):
    """Sizes that make flat shards end within rows, within experts and between the tensors of a fused parameter."""

    def __init__(self, config, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        generator = torch.Generator().manual_seed(1)
        self.fused = nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype))
        set_pieces(self.fused, [Piece("q", (4, 5), (0, 0), (slice(0, 4),)), Piece("k", (3, 5), (0, 0), (slice(4, 7),))])
        self.experts = nn.Parameter(torch.randn(3, 3, 7, generator=generator).to(dtype))
        set_pieces(self.experts, [Piece(f"experts.{e}.up", (3, 7), (0, 0), (e,)) for e in range(3)])
        self.norm = nn.Parameter(torch.ones(5, dtype=dtype))
        set_pieces(self.norm, [Piece("norm", (5,), (0,), ())])

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x * self.norm.float()) @ self.fused.float().t()
        return torch.einsum("bf,ehf->beh", hidden, self.experts.float()).tanh().square().sum() / (SAMPLES * len(x))


def train(engine: Engine, layout: Layout, steps: range) -> list[float]:
    """Loss of each step over the global batch."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        samples = torch.randn(SAMPLES, 2, 5, generator=generator)
        mine = SAMPLES // layout.data_size
        total = torch.zeros(())

        def forward_step(microbatches, model, total=total):
            def loss(output):
                total.add_(output.detach())
                return output.clone(), torch.ones((), dtype=torch.int32), {}

            return model(next(microbatches)), loss

        engine.train_step(
            forward_step,
            list(samples[layout.data_rank * mine :][:mine]),
            sequence_length=2,
            micro_batch_size=1,
            learning_rate=1e-2,
        )
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses


def run(rank: int, directory: str, sharded: bool, dtype: torch.dtype, save_at: int | None) -> tuple[list[float], Tensor]:
    """Trains from the newest checkpoint (or the start) to step 6, saving at `save_at`: (losses, all weights)."""
    config = ParallelConfig(distributed_optimizer=sharded)
    layout = initialize(config, seed=0)
    try:
        megatron = transformer_config(parallel=config, params_dtype=dtype, layers=1, hidden_size=8)
        model = Toy(megatron, dtype)
        engine = Engine(model, layout, megatron, AdamW())
        checkpoint = restore_run(directory, engine, model)
        start = 0 if checkpoint is None else checkpoint.step
        losses = []
        if save_at is not None:
            losses += train(engine, layout, range(start, save_at))
            save_run(directory, engine, model, save_at, {})
            start = save_at
        losses += train(engine, layout, range(start, 6))
        return losses, torch.cat([p.detach().float().flatten() for p in model.parameters()])
    finally:
        shutdown(leave_world=False)


class FusedAdam(torch.optim.Optimizer):
    """As Transformer Engine's and Apex's, which Megatron prefers where they are installed: steps are counted once for a group."""

    made = 0

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode):
        assert adam_w_mode
        FusedAdam.made += 1
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                assert state.keys() == {"exp_avg", "exp_avg_sq"}
                first, second = group["betas"]
                state["exp_avg"].lerp_(param.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(param.grad, param.grad, value=1 - second)
                scale = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt_().add_(group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - first ** group["step"]))


def run_fused(rank: int, directory: str, save_at: int | None) -> tuple[list[float], Tensor]:
    FusedAdam.made = 0
    with patch("megatron.core.optimizer.Adam", FusedAdam), patch("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", False):
        result = run(rank, directory, False, torch.bfloat16, save_at)
    assert FusedAdam.made > 0
    return result


def test_an_optimizer_that_counts_steps_in_its_groups_is_saved_and_resumed(ranks, tmp_path):
    ((losses, weights),) = ranks(1)(run_fused, str(tmp_path), 3)
    assert int(open_checkpoint(tmp_path).read_full("step")) == 3
    ((resumed, final),) = ranks(1)(run_fused, str(tmp_path), None)
    assert resumed == losses[3:] and torch.equal(final, weights)
    ((plain, _),) = ranks(1)(run, str(tmp_path), False, torch.bfloat16, None)  # and torch's goes on from it
    assert plain == pytest.approx(losses[3:], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimizer_state_moves_between_data_parallel_layouts(ranks, tmp_path, dtype):
    """Masters and moments of 2 ranks with the distributed optimizer serve 1 rank, 2 ranks without it, and back."""
    for source_ranks, source_sharded in ((2, True), (1, False)):
        directory = str(tmp_path / f"{source_ranks}")
        (losses, weights), *_ = ranks(source_ranks)(run, directory, source_sharded, dtype, 3)
        checkpoint = open_checkpoint(directory)
        assert len(checkpoint.names("exp_avg")) == len(checkpoint.names("model")) == 6
        assert len(checkpoint.names("master")) == (6 if dtype == torch.bfloat16 else 0)
        assert int(checkpoint.read_full("step")) == 3
        for target_ranks, target_sharded in ((2, True), (2, False), (1, False)):
            for resumed, final in ranks(target_ranks)(run, directory, target_sharded, dtype, None):
                if (target_ranks, target_sharded) == (source_ranks, source_sharded):
                    assert resumed == losses[3:] and torch.equal(final, weights)
                else:
                    assert resumed == pytest.approx(losses[3:], rel=1e-6)
                    torch.testing.assert_close(final, weights, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
