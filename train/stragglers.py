"""The slowest rank: found by the time each rank works between collectives, since in a synchronous step all ranks take equally long.

A slow rank works while the others wait for it, so a step's own time is its time without what was waited for other ranks
(`parallel.collectives`). At every logged step ranks exchange five numbers:

    ranks/own_seconds_max, _median     own time of the step, of the slowest rank and of the middle one
    ranks/slowest                      which rank that is
    ranks/data_seconds_max, _median    and of its phases, on each rank's host clock: data, forward_backward, optimizer
    ...

On a GPU the device waits, and the host's clock sees a slow loader or a slow host but no slow device; the preflight compares devices.
"""

import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.layout import Layout
from train.observe.base import Alert, StragglersConfig

PHASES = ("data", "forward_backward", "optimizer")
LEAST = 0.02  # seconds: less is noise, whatever its ratio


@dataclass(frozen=True)
class Times:
    """Of one rank and one step, in seconds. own: without waiting for other ranks; the phases include it."""

    own: float
    data: float
    forward_backward: float
    optimizer: float


class Stragglers:
    """Made by every rank. What `measure` returns is the same on each of them."""

    def __init__(self, config: StragglersConfig, layout: Layout) -> None:
        self._config, self._layout = config, layout
        self._rank = -1  # the slowest of late
        self._logged = 0  # steps in a row
        self._told = -1

    def measure(self, step: int, times: Times) -> tuple[dict[str, float], Alert | None]:
        """`ranks/*` of a logged step, and an alert where one rank has been the slowest for long; collective."""
        if self._layout.world_size == 1:
            return {}, None
        mine = torch.tensor(
            [times.own, times.data, times.forward_backward, times.optimizer], dtype=torch.float64, device=self._layout.device
        )
        all_ranks = [torch.empty_like(mine) for _ in range(self._layout.world_size)]
        dist.all_gather(all_ranks, mine)
        table = torch.stack(all_ranks).cpu()
        metrics: dict[str, float] = {}
        for column, name in enumerate(("own", *PHASES)):
            values = table[:, column].tolist()
            metrics |= {f"ranks/{name}_seconds_max": max(values), f"ranks/{name}_seconds_median": statistics.median_low(values)}
        own = table[:, 0].tolist()
        slowest = own.index(max(own))
        metrics["ranks/slowest"] = slowest
        return metrics, self._judge(step, slowest, own)

    def _judge(self, step: int, slowest: int, own: list[float]) -> Alert | None:
        # Of two ranks the quicker one is the measure: a median between them would hide half of it.
        seconds, usual = own[slowest], statistics.median_low(own)
        slow = self._config.steps > 0 and seconds > self._config.ratio * usual and seconds - usual > LEAST
        self._logged = (self._logged + 1 if slowest == self._rank else 1) if slow else 0
        self._rank = slowest if slow else -1
        if not slow:
            self._told = -1
        if self._logged < self._config.steps or not slow or self._told == slowest:
            return None
        self._told = slowest
        return Alert(
            "straggler",
            step,
            f"rank {slowest} is slow: in {self._logged} logged steps in a row it worked longer than any other, now {seconds:.3g} s a step where the "
            f"median rank works {usual:.3g} s, and the others wait for it: look at its machine",
        )
