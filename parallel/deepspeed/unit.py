"""Our process groups as DeepSpeed asks for them: a model-parallel unit, and its register of expert groups."""

from typing import Any

from torch import nn

from parallel.deepspeed.library import DeepSpeedZeRoOffload, Init, MoE, groups
from parallel.layout import Layout

EXPERTS = "experts"
"""The one name under which DeepSpeed knows all routed experts."""


class ModelParallelUnit:
    """DeepSpeed's `mpu`: which ranks hold other parts of the same layers, and which hold the same part."""

    def __init__(self, layout: Layout):
        self._layout = layout

    def get_model_parallel_group(self) -> Any:
        return self._layout.groups.tp

    def get_model_parallel_world_size(self) -> int:
        return self._layout.tensor_size

    def get_model_parallel_rank(self) -> int:
        return self._layout.tensor_rank

    def get_data_parallel_group(self) -> Any:
        return self._layout.groups.dp

    def get_data_parallel_world_size(self) -> int:
        return self._layout.data_size

    def get_data_parallel_rank(self) -> int:
        return self._layout.data_rank


class ExpertGroups(MoE):
    """Tells DeepSpeed, which looks for its own MoE layers, that there are experts whose gradients are summed over other ranks. Computes nothing."""

    def __init__(self, layout: Layout, experts: int):
        nn.Module.__init__(self)
        self.num_experts = experts
        self._layout = layout

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        groups._EXPERT_PARALLEL_GROUP[EXPERTS] = self._layout.groups.ep
        groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = self._layout.groups.expt_dp

    def forward(self, *inputs: Any) -> None:
        raise NotImplementedError("a register of groups computes nothing")


def forget() -> None:
    """Lets go of the groups, and begins to count modules and parameters anew: ranks whose processes have had other engines before must agree."""
    groups.mpu = None
    Init.param_id = 0
    (count,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    count[0] = 0
    for known in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
        known.pop(EXPERTS, None)
