"""The engine: data parallelism, gradient accumulation, clipping and AdamW around the model, on Megatron-core.

One optimizer step is

    schedule (microbatches, pipeline) -> reduce gradients -> finite? -> clip -> AdamW on fp32 masters

Gradients are accumulated and reduced in fp32 and only ever added: the loss is normalised over the global batch before the backward pass.
A step whose gradients are not finite on some rank is taken by no rank.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parallel.layout import Layout


@dataclass(frozen=True)
class AdamW:
    """AdamW's constants and the norm gradients are clipped to. Weight decay never touches tensors of one dimension."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class StepResult:
    """grad_norm: of the whole model's gradient before clipping; taken: False when it was not finite and nothing was updated."""

    grad_norm: float
    taken: bool


@dataclass
class ParameterState:
    """What the optimizer on this rank keeps for one model parameter.

    master, exp_avg, exp_avg_sq: fp32, of the parameter's shape; with a flat_range (start, stop), 1-D: elements start ... stop - 1 of the
    flattened parameter (the distributed optimizer's share). master is None where the weight itself is fp32; the moments are None before
    the first step.
    """

    param: nn.Parameter
    master: Tensor | None
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    step: int | None
    flat_range: tuple[int, int] | None


class ForwardStep(Protocol):
    """(microbatches, model) -> (output, loss function), as Megatron's schedules want it."""

    def __call__(self, microbatches: Iterator[Any], model: nn.Module) -> tuple[Tensor, Any]: ...


class Engine:
    """Trains one model chunk per rank: model, this rank's pipeline stage, whose `config` attribute is `config`."""

    def __init__(self, model: nn.Module, layout: Layout, config: TransformerConfig, optimizer: AdamW):
        self.layout = layout
        self.config = config
        self.settings = optimizer
        if not torch.cuda.is_available():
            from parallel import cpu

            for param in model.parameters():
                cpu.as_cuda_type(param)
        self.module = model
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
                overlap_param_gather=False,
                use_distributed_optimizer=layout.config.distributed_optimizer,
                check_for_nan_in_grad=False,  # checked below, without ending the run
                average_in_collective=False,
            ),
            model,
        )
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=0.0,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.betas[0],
                adam_beta2=optimizer.betas[1],
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip,
                bf16=config.params_dtype == torch.bfloat16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=layout.config.distributed_optimizer,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        config.finalize_model_grads_func = self._finalize
        config.grad_scale_func = None
        config.no_sync_func = self.model.no_sync
        self._schedule: Callable[..., list[Any]] = get_forward_backward_func()

    # -- one step ------------------------------------------------------------------------------------------------------------------

    def train_step(
        self,
        forward_step: ForwardStep,
        microbatches: Sequence[Any],
        *,
        sequence_length: int,
        micro_batch_size: int,
        learning_rate: float,
    ) -> StepResult:
        """One optimizer step over `microbatches`; every rank of a pipeline passes the same ones."""
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(forward_step, iter(microbatches), len(microbatches), sequence_length, micro_batch_size, forward_only=False)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.settings.weight_decay * group["wd_mult"]
        return self._update()

    def evaluate(
        self, forward_step: ForwardStep, microbatches: Iterator[Any], count: int, *, sequence_length: int, micro_batch_size: int
    ) -> None:
        """Forward passes alone over `count` microbatches, through the same schedule; results are left in `forward_step`."""
        self.model.eval()
        with torch.no_grad():
            self._run(forward_step, microbatches, count, sequence_length, micro_batch_size, forward_only=True)

    def _run(
        self,
        forward_step: ForwardStep,
        microbatches: Iterator[Any],
        count: int,
        sequence_length: int,
        micro_batch_size: int,
        *,
        forward_only: bool,
    ) -> None:
        self._schedule(
            forward_step_func=forward_step,
            data_iterator=microbatches,
            model=[self.model],
            num_microbatches=count,
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )

    def _finalize(self, model: list[nn.Module], num_tokens: Tensor | None = None, **ignored: Any) -> None:
        # num_tokens stays behind: losses are already divided by the global counts.
        finalize_model_grads(model, None)

    def _update(self) -> StepResult:
        overflow = self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm() or 0.0)
        # The norm is a sum over model-parallel ranks, but replicas must agree too, and a bf16 overflow flag must not be lost.
        bad = torch.tensor([float(overflow or not math.isfinite(norm))], device=self.layout.device)
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if bad.item() > 0:
            return StepResult(norm, taken=False)
        return StepResult(norm, taken=bool(self.optimizer.step()[0]))

    # -- state, by model parameter -------------------------------------------------------------------------------------------------

    def parameter_states(self) -> Iterable[ParameterState]:
        """The optimizer's tensors on this rank, each beside the parameter it belongs to; live, so that a checkpoint can fill them."""
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            if getattr(optimizer, "is_stub_optimizer", False):
                continue
            for param, master, flat_range in _masters(optimizer):
                state = optimizer.optimizer.state.get(master, {})
                # torch counts steps beside each parameter; TE's and Apex's fused Adam, which Megatron prefers, once for a group.
                step = state.get("step", _group_of(optimizer, master).get("step")) if "exp_avg" in state else None
                yield ParameterState(
                    param=param,
                    master=None if param.dtype == torch.float32 else master.detach(),
                    exp_avg=state.get("exp_avg"),
                    exp_avg_sq=state.get("exp_avg_sq"),
                    step=None if step is None else int(step),
                    flat_range=flat_range,
                )

    def reload_masters(self) -> None:
        """Makes the fp32 masters equal the model's weights, after weights alone were loaded."""
        self.optimizer.reload_model_params()

    def load_step(self, step: int) -> None:
        """Makes room for Adam's moments, as after `step` steps; their values are then written in place (see `parameter_states`)."""
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            if getattr(optimizer, "is_stub_optimizer", False):
                continue
            for _, master, _ in _masters(optimizer):
                state = optimizer.optimizer.state[master]
                # A torch optimizer counts in fp32, on the CPU; a fused one of other packages as a whole number of the group.
                if isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW):
                    state["step"] = torch.tensor(float(step))
                else:
                    _group_of(optimizer, master)["step"] = step
                state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()
                state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()


def _group_of(optimizer: MegatronOptimizer, master: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.optimizer.param_groups if any(param is master for param in group["params"]))


def _masters(optimizer: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, Tensor, tuple[int, int] | None]]:
    """(model parameter, the tensor AdamW updates for it, its flat range when sharded) of one Megatron optimizer."""
    if isinstance(optimizer, DistributedOptimizer):
        for param, (group, order) in optimizer.model_param_group_index_map.items():
            span = optimizer._get_model_param_range_map(param)["param"]
            yield param, optimizer.optimizer.param_groups[group]["params"][order], (span.start, span.end)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for models, masters in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            yield from ((param, master, None) for param, master in zip(models, masters, strict=True))
        for models in optimizer.fp32_from_fp32_groups:
            yield from ((param, param, None) for param in models)
    else:
        for group in optimizer.optimizer.param_groups:
            yield from ((param, param, None) for param in group["params"])
