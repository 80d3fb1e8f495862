"""Megatron-core as the engine: its DistributedDataParallel, pipeline schedules and mixed-precision optimizers.

Megatron builds an Adam of its own. Its optimizers (fp32, bf16 with fp32 masters, distributed) are kept, with their masters, their gradient
norm and their all-gather; only torch's optimizer inside each is replaced by the recipe's, which then updates the same masters.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat, tee
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor, nn

from parallel.engine import ForwardStep, ModelSizes, Optimizer, ParameterState, StepResult, always, unmarked
from parallel.layout import Layout
from parallel.megatron import cpu
from parallel.megatron.config import transformer_config
from parallel.megatron.stage import MegatronStage
from parallel.stage import Stage

FlatRange = tuple[int, int] | None


class MegatronEngine:
    """See `parallel.engine.Engine`."""

    def __init__(self, chunks: Sequence[Stage], layout: Layout, sizes: ModelSizes, optimizer: Optimizer):
        self.layout = layout
        self.settings = optimizer
        self._config = config = transformer_config(layout.config, sizes)
        self._gathered = True
        if not torch.cuda.is_available():
            for chunk in chunks:
                for param in chunk.parameters():
                    cpu.as_cuda_type(param)
        sharded = layout.config.distributed_optimizer
        self.chunks: list[DistributedDataParallel] = [
            DistributedDataParallel(
                config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    overlap_grad_reduce=layout.config.overlap_grad_reduce,
                    overlap_param_gather=layout.config.overlap_param_gather,
                    use_distributed_optimizer=sharded,
                    check_for_nan_in_grad=False,  # checked below, without ending the run
                    average_in_collective=False,
                ),
                MegatronStage(chunk, config, layout),
                disable_bucketing=index > 0,  # reduced while other chunks' backward passes go on
            )
            for index, chunk in enumerate(chunks)
        ]
        chained = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",  # replaced below
                lr=0.0,
                weight_decay=optimizer.weight_decay,
                clip_grad=optimizer.clip,
                bf16=sizes.params_dtype == torch.bfloat16,
                params_dtype=sizes.params_dtype,
                use_distributed_optimizer=sharded,
                overlap_param_gather=layout.config.overlap_param_gather,
            ),
            self.chunks,
            use_gloo_process_groups=False,
        )
        assert isinstance(chained, ChainedOptimizer)
        self._chained = chained
        self._parts: list[MegatronOptimizer] = [part for part in chained.chained_optimizers if not part.is_stub_optimizer]
        for part in self._parts:
            part.optimizer = _instead_of(part.optimizer, optimizer)
        if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:  # neither Transformer Engine's nor Apex's
            clip_grads.l2_norm_impl = _l2_norm  # type: ignore[assignment]
        config.finalize_model_grads_func = self._finalize
        config.grad_scale_func = None
        syncs = [chunk.no_sync for chunk in self.chunks]
        config.no_sync_func = syncs[0] if len(syncs) == 1 else syncs  # type: ignore[assignment]  # the interleaved schedule takes a list
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
        mark: Callable[[str], None] = unmarked,
        agreed: Callable[[], bool] = always,
    ) -> StepResult:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._chained.zero_grad()
        feeds = [iter(microbatches) for _ in self.chunks]
        self._run(forward_step, feeds, len(microbatches), sequence_length, micro_batch_size, forward_only=False)
        self._gathered = True  # by the hooks of the forward pass
        mark("forward_backward")
        for group in self._chained.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.settings.weight_decay * group["wd_mult"]
        result = self._update(agreed())
        mark("optimizer")
        return result

    def evaluate(
        self, forward_step: ForwardStep, microbatches: Iterator[Any], count: int, *, sequence_length: int, micro_batch_size: int
    ) -> None:
        self.settle()
        for chunk in self.chunks:
            chunk.eval()
        if len(self.chunks) > 1 and 0 < count < self.layout.pipeline_size:  # fewer than the interleaved schedule takes
            forward_step, microbatches = _only_first(forward_step, count), _repeating_last(microbatches)
            count = self.layout.pipeline_size
        feeds = list(tee(microbatches, len(self.chunks)))  # each chunk asks for every microbatch
        with torch.no_grad():
            self._run(forward_step, feeds, count, sequence_length, micro_batch_size, forward_only=True)

    def settle(self) -> None:
        if not self._gathered:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
            self._gathered = True

    def _run(
        self,
        forward_step: ForwardStep,
        feeds: list[Iterator[Any]],
        count: int,
        sequence_length: int,
        micro_batch_size: int,
        *,
        forward_only: bool,
    ) -> None:
        if len(self.chunks) > 1:
            self._config.microbatch_group_size_per_vp_stage = microbatch_group(count, self.layout.pipeline_size)
        self._schedule(
            forward_step_func=forward_step,
            data_iterator=feeds if len(feeds) > 1 else feeds[0],
            model=self.chunks,
            num_microbatches=count,
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )

    def _finalize(self, model: list[nn.Module], num_tokens: Tensor | None = None, **ignored: Any) -> None:
        # num_tokens stays behind: losses are already divided by the global counts.
        finalize_model_grads(model, None)

    @torch.no_grad()
    def _update(self, agreed: bool) -> StepResult:
        """What Megatron's own step does, with the check of all ranks between the norm and the clipping."""
        overflow = self._chained.prepare_grads()
        norm = float(self._chained.get_grad_norm() or 0.0)
        # The norm is a sum over model-parallel ranks, but replicas must agree too, and a bf16 overflow flag must not be lost.
        bad = torch.tensor([float(overflow or not (agreed and math.isfinite(norm)))], device=self.layout.device)
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if bad.item() > 0:
            return StepResult(norm, taken=False)
        for part in self._parts:
            if parameters := part.get_parameters():
                # By its module, where Megatron itself looks for it: without CUDA it is another one.
                megatron_optimizer.clip_grad_by_total_norm_fp32(parameters, max_norm=self.settings.clip, total_norm=norm)
        taken = bool(self._chained.step_with_ready_grads())
        self._gathered = not self.layout.config.overlap_param_gather
        return StepResult(norm, taken)

    # -- state, by model parameter -------------------------------------------------------------------------------------------------

    def parameter_states(self) -> Iterator[ParameterState]:
        for part, param, master, flat_range in self._masters():
            tensors: dict[str, Tensor] = {}
            numbers: dict[str, float] = {}
            state = part.optimizer.state.get(master, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == master.shape:
                    tensors[name] = value.detach()
                else:
                    numbers[name] = value.item() if isinstance(value, Tensor) else value
            if state:
                group = _group_of(part.optimizer, master)
                numbers |= {name: group[name] for name in self.settings.group_numbers}
            yield ParameterState(param, None if param.dtype == torch.float32 else master.detach(), tensors, numbers, flat_range)

    def make_room(self, number: Callable[[nn.Parameter, str], float]) -> None:
        for part, param, master, _ in self._masters():
            room = self.settings.room(master)
            for name, value in room.items():
                if value.shape != master.shape:
                    value.fill_(number(param, name))
            part.optimizer.state[master] = room
            group = _group_of(part.optimizer, master)
            group |= {name: type(group.get(name, 0))(number(param, name)) for name in self.settings.group_numbers}

    def reload_masters(self) -> None:
        self._chained.reload_model_params()

    @torch.no_grad()
    def update_masters(self, changes: Mapping[nn.Parameter, Callable[[Tensor], None]]) -> None:
        if not changes:
            return
        held = {param: (master.detach(), flat_range) for _, param, master, flat_range in self._masters()}
        groups = {
            param: part.data_parallel_group
            for part in self._parts
            if isinstance(part, DistributedOptimizer)
            for buffer in part.buffers
            for param in buffer.params
        }
        for param, change in changes.items():
            if param not in groups:
                master, _ = held[param]
                change(master)
                param.copy_(master)
                continue
            # Each rank holds a part of the flattened master, or none of it.
            whole = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
            master, flat_range = held.get(param, (whole.new_empty(0), (0, 0)))
            assert flat_range is not None
            mine = whole.view(-1)[slice(*flat_range)]
            mine.copy_(master)
            torch.distributed.all_reduce(whole, group=groups[param])
            change(whole)
            param.copy_(whole)
            master.copy_(mine)

    def close(self) -> None:
        """Nothing of Megatron's outlives its objects."""

    def _masters(self) -> Iterator[tuple[MegatronOptimizer, nn.Parameter, Tensor, FlatRange]]:
        """(Megatron's optimizer, model parameter, the tensor torch's optimizer updates for it, its flat range when sharded)."""
        for part in self._parts:
            groups = part.optimizer.param_groups
            if isinstance(part, DistributedOptimizer):
                for param, (group, order) in part.model_param_group_index_map.items():
                    buffer, dtype, bucket = part.model_param_gbuf_map[param]
                    span = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][param]["param"]
                    yield part, param, groups[group]["params"][order], (span.start, span.end)
            elif isinstance(part, Float16OptimizerWithFloat16Params):
                for models, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
                    yield from ((part, param, master, None) for param, master in zip(models, masters, strict=True))
                for models in part.fp32_from_fp32_groups:
                    yield from ((part, param, param, None) for param in models)
            else:
                yield from ((part, param, param, None) for group in groups for param in group["params"])


def microbatch_group(count: int, stages: int) -> int:
    """How many microbatches a stage passes through one of its parts before it turns to the next: at least one for each stage, and what is left of
    `count` for the last group must be none, or as many."""
    return next(group for group in range(stages, count + 1) if count % group == 0 or count % group >= stages)


def _repeating_last(microbatches: Iterator[Any]) -> Iterator[Any]:
    last = None
    for last in microbatches:
        yield last
    yield from repeat(last)


def _only_first(forward_step: ForwardStep, count: int) -> ForwardStep:
    """Losses of the first `count` microbatches; the others leave nothing behind."""
    losses = 0

    def step(microbatches: Iterator[Any], model: nn.Module) -> tuple[Tensor, Any]:
        output, loss = forward_step(microbatches, model)

        def counted(output: Tensor) -> Any:
            nonlocal losses
            losses += 1
            return loss(output) if losses <= count else (output.new_zeros(()), torch.zeros((), dtype=torch.int32, device=output.device), {})

        return output, counted

    return step


def _instead_of(adam: torch.optim.Optimizer, optimizer: Optimizer) -> torch.optim.Optimizer:
    """The recipe's optimizer over the masters of Megatron's Adam, which has not taken a step."""
    groups = [{key: value for key, value in group.items() if key not in adam.defaults} for group in adam.param_groups]
    # Some masters are views, which torch's constructor refuses: it is shown detached ones of the same memory.
    made = optimizer.make([{**group, "params": [master.detach() for master in group["params"]]} for group in groups])
    for group, masters in zip(made.param_groups, groups, strict=True):
        group["params"] = masters["params"]
    return made


def _group_of(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(param is master for param in group["params"]))


def _l2_norm(chunk_size: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool, *ignored: Any) -> tuple[Tensor, None]:
    """The norm of all tensors, fp32 [1], in the signature of Apex's kernel. Megatron's own stand-in for it waits for the device once a tensor."""
    norms = torch._foreach_norm([tensor for tensors in lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None
