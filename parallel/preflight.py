"""What a node must show before a run starts on it: the recipe's `cluster.preflight` group. `launch/preflight.py` measures and judges."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class PreflightConfig:
    """The recipe's `cluster.preflight` group."""

    enabled: bool = True
    """Whether a job looks at its nodes before it trains."""
    patience_seconds: float = 180.0
    """Seconds in which every rank must have come, and must have answered each question."""
    free_memory: float = 0.9
    """Least share of a device's memory that is free: less means that another process holds it. Without meaning on CPUs."""
    host_memory_bytes: int = 1_000_000_000
    """Least bytes of memory free on a node."""
    gemm_share: float = 0.8
    """Least speed of a rank's matrix product, as a share of the median over all ranks."""
    gemm_seconds: float = 2.0
    """Seconds for which the matrix product is measured."""
    bandwidth_share: float = 0.5
    """Least all-reduce bandwidth between two nodes, as a share of the median over all pairs."""
    bandwidth_bytes: int = 64_000_000
    """Bytes that each pair of ranks reduces."""
    bandwidth_seconds: float = 60.0
    """Seconds for pairs of nodes; when they do not suffice for all pairs, every node meets as many others as they allow."""
    clock_seconds: float = 2.0
    """Largest difference of a node's clock from the first one's."""
    disk_bytes: int = 64_000_000
    """Bytes each node writes into the run directory."""
    disk_bytes_per_second: float = 10e6
    """Least speed at which a node writes there."""
    free_disk_bytes: int = 1_000_000_000
    """Least bytes free there."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for a threshold that cannot be."""
        for key, value in asdict(self).items():
            if value is True or value is False:
                continue
            if value < 0 or (key in ("patience_seconds", "gemm_seconds", "bandwidth_bytes", "disk_bytes") and value == 0):
                raise ValueError(f"cluster.preflight.{key}={value} must be positive: set cluster.preflight.enabled=false for no preflight")
            if key in ("free_memory", "gemm_share", "bandwidth_share") and value >= 1:
                raise ValueError(f"cluster.preflight.{key}={value} is a share below 1: use for instance 0.8")
