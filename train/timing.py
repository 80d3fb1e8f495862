"""Where the time of a step goes, on rank 0's clock.

    step_seconds                 the whole optimizer step
    seconds/data                 of it, waiting for the step's batches and moving them to the device
    seconds/forward_backward     forward and backward passes, with what pipeline and data parallelism add to them
    seconds/optimizer            gradient norm, clipping, the optimizer, and what it sends
    seconds/other                the rest: loss counts and means, expert biases, health of quantisation
    seconds/evaluation           an evaluation, beside eval/loss
    seconds/checkpoint           training stood still for checkpoints since the last logged step

On a GPU the passes are only queued when their calls return, so their ends are events of the device, read when the step is over.
"""

import time

import torch


class Stopwatch:
    """`mark(name)` ends the phase that began with the mark before; `seconds()` gives them all, and waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]
        self._host = time.perf_counter()
        self._waited: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self._waited[name] = self._waited.get(name, 0.0) + now - self._host
        self._host = now
        self._marks.append((name, self._now()))

    def host_seconds(self, name: str) -> float:
        """Of a phase on the host's own clock, without waiting for the device."""
        return self._waited.get(name, 0.0)

    def seconds(self) -> dict[str, float]:
        """Of every phase; phases of the same name are added."""
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(begin, float) and isinstance(end, float):
                seconds = end - begin
            else:
                seconds = begin.elapsed_time(end) / 1000  # type: ignore[union-attr, arg-type]
            total[name] = total.get(name, 0.0) + seconds
        return total

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
