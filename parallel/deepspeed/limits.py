"""What the DeepSpeed engine cannot do, said without DeepSpeed, before anything starts."""

from importlib.util import find_spec

from parallel.layout import ParallelConfig

STAGES = (1, 2, 3)


def check(config: ParallelConfig, compute: str) -> None:
    """Raises ValueError, in one sentence, for a layout or an activation dtype (`precision.compute`) this engine does not take, or where DeepSpeed
    is not installed."""
    asked = "with parallel.engine=deepspeed"
    for key, what in (("pipeline", "has no pipeline stages here"), ("context", "does not split sequences here")):
        if (size := getattr(config, key)) > 1:
            raise ValueError(
                f"parallel.{key}={size} cannot be had {asked}, which {what}: use parallel.{key}=1, or parallel.engine=megatron"
            )
    if config.zero_stage not in (None, *STAGES):
        raise ValueError(
            f"parallel.zero_stage={config.zero_stage} is not available: use 1, which splits the optimizer's state, 2, gradients too, or 3, all"
        )
    if config.zero_stage == 3:
        for key in ("tensor", "expert", "expert_tensor"):
            if (size := getattr(config, key)) > 1:
                raise ValueError(
                    f"parallel.{key}={size} cannot be had with parallel.zero_stage=3, which splits weights over data-parallel ranks alone: use "
                    f"parallel.{key}=1, or parallel.zero_stage=2"
                )
    for key in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        if getattr(config, key):
            raise ValueError(
                f"parallel.{key}=true is Megatron's and has no meaning {asked}, which splits what parallel.zero_stage says: use parallel.{key}=false"
            )
    if compute != "fp32":
        raise ValueError(
            f"precision.compute={compute} cannot be had {asked}, whose reduction rounds gradients to {compute}: use precision.compute=fp32, or "
            "parallel.engine=megatron"
        )
    if find_spec("deepspeed") is None:
        raise ValueError(
            "parallel.engine=deepspeed needs the package deepspeed, which is not installed: use pip install -c constraints.txt -e '.[deepspeed]', or "
            "parallel.engine=megatron"
        )
