"""DeepSpeed as the engine: ZeRO under the same loop, stages 1 and 2 with tensor and expert parallelism, stage 3 with data parallelism alone.

    stage 1    each data-parallel rank keeps the optimizer's state, and updates the weights, of a part of the flattened model
    stage 2    and keeps the sum of the gradients of that part alone: they are reduced after each microbatch, not once a step
    stage 3    and keeps that part of the weights alone: modules gather theirs when they compute, and let go of them afterwards

Losses are normalised before the backward pass, so DeepSpeed is told to sum gradients and never to average them; stage 3 cannot be told, and gets
them multiplied by what it divides by. Weights are fp32 and serve as their own masters, as in Megatron: DeepSpeed's copy of them is replaced by the
part of the weights that it is a copy of. Of a GPU's weights the copy in host memory stays, and is made anew before each step, because a checkpoint
or whoever changes weights in place fills the weights alone.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.deepspeed.library import deepspeed
from parallel.deepspeed.parts import Parts, SplitState, SplitWeights
from parallel.deepspeed.unit import EXPERTS, ExpertGroups, ModelParallelUnit, forget
from parallel.engine import ForwardStep, ModelSizes, Optimizer, ParameterState, StepResult, always, unmarked
from parallel.layout import Layout
from parallel.megatron.stage import mark
from parallel.shards import spread_of
from parallel.stage import Stage

BUCKET = 50_000_000
"""elements of gradients reduced at a time"""
PERSISTENT = 100_000
"""elements of a parameter that is never split, at most: DeepSpeed's default"""


class DeepSpeedStage(nn.Module):
    """The whole model on this rank as DeepSpeed wants it: forward takes the microbatch alone."""

    def __init__(self, stage: Stage, layout: Layout, experts: int | None):
        super().__init__()
        self.stage = stage
        self._layout = layout
        for param in stage.parameters():
            if (spread := spread_of(param)) is not None:
                mark(param, spread, layout)  # DeepSpeed reads Megatron's marks
            if reduced_apart(param):
                param.group_name = EXPERTS  # type: ignore[attr-defined]
        if any(reduced_apart(param) for param in stage.parameters()):
            assert experts is not None
            self.experts = ExpertGroups(layout, experts)

    def forward(self, microbatch: Any) -> Tensor:
        return self.stage(microbatch, None)


def reduced_apart(param: nn.Parameter) -> bool:
    """Whether these are experts, of which other ranks hold replicas than of the dense modules."""
    return not getattr(param, "allreduce", True)


class DeepSpeedEngine:
    """See `parallel.engine.Engine`."""

    def __init__(self, chunks: Sequence[Stage], layout: Layout, sizes: ModelSizes, optimizer: Optimizer):
        (chunk,) = chunks
        self.layout = layout
        self.settings = optimizer
        module = DeepSpeedStage(chunk, layout, sizes.experts)
        if layout.sequence_parallel:
            for param in chunk.parameters():
                if getattr(param, "sequence_parallel", False):
                    param.register_hook(self._over_tensor_ranks)  # of each microbatch, before DeepSpeed's own hook
        stage = layout.config.zero_stage or 1
        if stage == 3:
            for param in chunk.parameters():
                param.register_hook(lambda grad: grad * layout.data_size)  # by which DeepSpeed divides the sum
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed insists on; launchers set it
        self._engine, zero, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer.make(parameter_groups(chunk)),
            mpu=ModelParallelUnit(layout),
            config=config_of(layout, optimizer, sum(param.numel() for param in chunk.parameters())),
        )
        self._parts: Parts = SplitWeights(zero) if stage == 3 else SplitState(zero)
        self._groups: list[dict[str, Any]] = zero.param_groups
        self._state: dict[Tensor, dict[str, Any]] = zero.state
        self._masters_apart = layout.config.offload_optimizer and layout.device.type == "cuda"
        if not self._masters_apart:
            self._parts.share_masters()
        self._parts.gather()

    def _over_tensor_ranks(self, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total, group=self.layout.groups.tp)
        return total

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
        self._engine.train()
        self._parts.release()
        self.reload_masters()
        feed = iter(microbatches)
        for left in reversed(range(len(microbatches))):
            self._engine.set_gradient_accumulation_boundary(left == 0)
            output, loss = forward_step(feed, self._engine)
            self._engine.backward(loss(output)[0], scale_wrt_gas=False)
        mark("forward_backward")
        for group in self._groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.settings.weight_decay * group["wd_mult"]
        result = self._update(agreed())
        mark("optimizer")
        return result

    @torch.no_grad()
    def _update(self, agreed: bool) -> StepResult:
        objection = torch.tensor([float(not agreed)], device=self.layout.device)
        dist.all_reduce(objection, op=dist.ReduceOp.MAX)
        if objection.item() > 0:
            norm = self._parts.norm()
            self._parts.discard()
            return StepResult(norm, taken=False)
        self._engine.step()  # takes no step on any rank where the norm, of which all have the same, is not finite
        return StepResult(float(self._engine.get_global_grad_norm()), self._engine.was_step_applied())

    def evaluate(
        self, forward_step: ForwardStep, microbatches: Iterator[Any], count: int, *, sequence_length: int, micro_batch_size: int
    ) -> None:
        self._engine.eval()
        self._parts.release()
        with torch.no_grad():
            for _ in range(count):
                output, loss = forward_step(microbatches, self._engine)
                loss(output)

    # -- state, by model parameter -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Gathers weights that are split; the others are whole at the end of each step."""
        self._parts.gather()

    def parameter_states(self) -> Iterator[ParameterState]:
        for index, (group, master) in enumerate(zip(self._groups, self._parts.masters, strict=True)):
            state = self._state.get(master, {})
            flat = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor) and value.dim() == 1}
            numbers = {name: float(value) for name, value in state.items() if name not in flat}
            if state:
                numbers |= {name: group[name] for name in self.settings.group_numbers}
            for param, (start, stop), at in self._parts.held(index):
                tensors = {name: value[at : at + stop - start] for name, value in flat.items()}
                yield ParameterState(param, None, tensors, dict(numbers), (start, stop))

    def make_room(self, number: Callable[[nn.Parameter, str], float]) -> None:
        """Raises ValueError for numbers that differ between parameters, which share their state here."""
        for group, master, params in zip(self._groups, self._parts.masters, self._parts.params, strict=True):
            room = self.settings.room(master)
            for name, value in room.items():
                if value.shape != master.shape:
                    value.fill_(_one_number(params, name, number))
            self._state[master] = room
            group |= {name: type(group.get(name, 0))(_one_number(params, name, number)) for name in self.settings.group_numbers}

    def reload_masters(self) -> None:
        if self._masters_apart:
            self._parts.refill_masters()

    @torch.no_grad()
    def update_masters(self, changes: Mapping[nn.Parameter, Callable[[Tensor], None]]) -> None:
        if changes:
            self.settle()
        for param, change in changes.items():
            change(param)

    def close(self) -> None:
        self._engine.destroy()
        forget()


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters by whether weight decay touches them, and by the ranks that hold replicas of them: each group is flattened for itself."""
    groups = []
    for apart in (False, True):
        for decayed in (True, False):
            params = [p for p in model.parameters() if p.requires_grad and reduced_apart(p) == apart and (p.dim() > 1) == decayed]
            if params:
                named = {"moe": True, "name": EXPERTS} if apart else {}
                groups.append({"params": params, "wd_mult": float(decayed), **named})
    return groups


def config_of(layout: Layout, optimizer: Optimizer, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration, for so many elements of parameters. Batch sizes are ours to know: it is told when a step's last microbatch comes."""
    zero: dict[str, Any] = {
        "stage": (stage := layout.config.zero_stage or 1),
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": min(BUCKET, elements),  # which DeepSpeed allocates for each microbatch
    }
    if stage == 3:
        # Parameters of less than a thousandth of the model stay whole; those of a group are updated at once.
        zero |= {"stage3_param_persistence_threshold": min(PERSISTENT, elements // 1000), "sub_group_size": max(elements, 1)}
    if layout.config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": layout.device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _one_number(params: Sequence[nn.Parameter], name: str, number: Callable[[nn.Parameter, str], float]) -> float:
    values = {number(param, name) for param in params}
    if len(values) > 1:
        raise ValueError(
            f"{name} of the optimizer differs between parameters, which the DeepSpeed engine cannot keep: use parallel.engine=megatron"
        )
    return values.pop()
