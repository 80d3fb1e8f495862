"""The hardware a run has, or would have: what launching, planning and the MFU are computed from.

Profiles are YAML files, recipes/cluster/*.yaml: a cluster of your own is one more file there, and `cluster=NAME cluster.nodes=8` takes it. A
run on GPUs without `cluster` finds the profile by the name CUDA gives its device (see `matching`). A cluster of your own says there, too, what
its scheduler is told (`slurm`).

Peaks are FLOP/s of one device for dense matrices, as the manufacturer states them: no run reaches them, and that is their point. Structured
sparsity, which doubles them in most tables, is not counted.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

from parallel.preflight import PreflightConfig
from parallel.slurm import SlurmConfig


@dataclass(frozen=True)
class PeakFlops:
    """FLOP/s of one device by the format a matrix product is multiplied in."""

    fp32: float | None = None
    """FLOP/s in fp32 proper, not TF32; null: measured where the run is."""
    bf16: float | None = None
    """FLOP/s of bf16 operands with fp32 accumulation; null: as fp32."""
    mxfp8: float | None = None
    """FLOP/s of MXFP8 operands; null: the device has no such units and multiplies them in bf16."""
    nvfp4: float | None = None
    """FLOP/s of NVFP4 operands; null: the device has no such units and multiplies them in bf16."""


@dataclass(frozen=True)
class ClusterConfig:
    """The recipe's `cluster` group: one kind of device, how many stand in a node, and how many nodes."""

    name: str | None = None
    """Of the profile; null: the one that fits this machine."""
    device: str | None = None
    """The name CUDA gives the device, as a glob; null: not found by its name."""
    nodes: int | None = None
    """Nodes to launch on or to plan for; null: one."""
    devices_per_node: int | None = None
    """Devices, and so ranks, of a node; null: as many as it has."""
    memory_bytes: int | None = None
    """Bytes of memory of a device; null: not known."""
    memory_bytes_per_second: float | None = None
    """Bytes/s between a device and its memory; null: not known."""
    link_bytes_per_second: float | None = None
    """Bytes/s a device sends to others of its node, one direction; null: not known."""
    network_bytes_per_second: float | None = None
    """Bytes/s a device sends to another node, one direction; null: not known."""
    peak_flops: PeakFlops = field(default_factory=PeakFlops)
    """FLOP/s of a device by format."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What Slurm is told, by python -m launch.slurm."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """What the nodes of a job must show before it trains."""

    @property
    def ranks(self) -> int:
        """Of a run on all its nodes. Raises ValueError where the profile does not say how many a node has."""
        if self.devices_per_node is None:
            raise ValueError(
                "cluster.devices_per_node=null: say how many ranks a node is to have, or choose a profile that does, such as cluster=h100"
            )
        return (self.nodes or 1) * self.devices_per_node

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for a number that cannot be."""
        values = asdict(self)
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        numbers |= {f"peak_flops.{key}": value for key, value in values["peak_flops"].items() if value is not None}
        for key, value in numbers.items():
            if not value > 0:
                raise ValueError(f"cluster.{key}={value} must be positive: leave it out (null) where it is not known")
        self.slurm.validate()
        self.preflight.validate()

    def peak(self, format: str) -> float | None:
        """FLOP/s at which this device multiplies operands of `format`, or None when it is not known.

        A format without units of its own, one that is registered from outside among them, is multiplied in bf16, and bf16 in fp32.
        """
        peaks = asdict(self.peak_flops)
        own = peaks.get(format)
        if own is None and format != "fp32":
            own = peaks["bf16"]
        return peaks["fp32"] if own is None else own


def matching(device: str, profiles: Iterable[ClusterConfig]) -> ClusterConfig | None:
    """The profile of a device by the name CUDA gives it (`torch.cuda.get_device_name`)."""
    return next((profile for profile in profiles if profile.device is not None and fnmatchcase(device, profile.device)), None)
