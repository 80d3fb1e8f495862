"""What watches a run and never takes part in it: console, metrics.jsonl, Weights & Biases, the picture of the losses.

The loop calls one object, `open_observers(...)`, at the few moments of `base.Observer`; each observer is a small
class in its own file, acts on rank 0 only, and keeps what it must remember in `state()`, which the checkpoint stores.
"""

from train.observe.base import MonitorConfig, Observer, RunInfo, register_observer
from train.observe.opening import Observers, open_observers

__all__ = ["MonitorConfig", "Observer", "Observers", "RunInfo", "open_observers", "register_observer"]
