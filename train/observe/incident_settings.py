"""What is done about numerical incidents: the recipe's `monitor.incidents` and `monitor.replicas`, see `train.incidents`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class IncidentsConfig:
    """When a run goes back, and what is worth an alert."""

    skips: int = 10
    """Consecutive steps without finite loss and gradients after which the run goes back to its last good checkpoint."""
    rewinds: int = 3
    """How often a run may go back, over its whole life, before it stops; 0: it never goes back."""
    on_spike: Literal["alert", "rewind"] = "alert"
    """What a spike of loss or gradient norm leads to: alert, or rewind, which skips that step's samples too."""
    window: int = 100
    """Steps that spikes are compared with, and over which the other watches take their median."""
    spike: float = 10.0
    """Robust standard deviations above the median, on a log scale, that make a spike."""
    mtp_ratio: float = 1.25
    """loss/mtp_2 divided by loss/mtp_1 (median) above which MTP diverges."""
    router_violation: float = 5.0
    """moe/max_violation (median): largest load of an expert over the mean load, above which routing is out of balance."""
    zero_gradients: float = 0.9
    """Share of the elements of one weight gradient that are exactly 0, above which an alert names the module."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for a value that cannot be used."""
        for name, least in (("skips", 1), ("rewinds", 0), ("window", 20)):
            if getattr(self, name) < least:
                raise ValueError(f"monitor.incidents.{name}={getattr(self, name)} must be at least {least}")
        for name, above in (("spike", 0.0), ("mtp_ratio", 1.0), ("router_violation", 1.0), ("zero_gradients", 0.0)):
            if not getattr(self, name) > above:
                raise ValueError(f"monitor.incidents.{name}={getattr(self, name)} must be more than {above:g}")


@dataclass(frozen=True)
class ReplicasConfig:
    """Whether what several ranks hold is compared, see `parallel.replicas`."""

    every: int = 500
    """Steps between comparisons, and one before every checkpoint; 0: never."""
    on_mismatch: Literal["stop", "alert", "rewind"] = "stop"
    """What replicas that differ lead to: stop, alert, or rewind to the last checkpoint, before which they were equal."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for a value that cannot be used."""
        if self.every < 0:
            raise ValueError(f"monitor.replicas.every={self.every} is negative: use 0 for never, or for instance 500")
