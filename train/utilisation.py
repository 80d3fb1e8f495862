"""MFU, model FLOPs utilisation: how much of the hardware's peak a training step uses.

    MFU = sum over formats (FLOPs of the step in this format / peak FLOP/s of a device in this format) / devices / seconds of the step

which is the time the step's matrix products would take on devices that did nothing else and ran at their peak, as a share of the time the
step took. Where all products have one format this is the usual definition (PaLM, appendix B): FLOPs / (seconds x devices x peak).

FLOPs are those the model needs, whatever the run does beside: forward and twice as much backward, of the linear layers (head and router
included, experts at their active FLOPs, every MTP depth), of attention (causal: half the square) and of the SSD. Recomputed activations,
padding, quantisation, norms, the optimizer and communication count as time, never as work.

A format counts at the peak of the units a device has for it, else of those it is multiplied in (`parallel.cluster.ClusterConfig.peak`), and
never below that of precision.compute, at which attention and SSD count: a router or an SSD kept in fp32 under bf16 is a price the run pays,
and at fp32's own peak, thirty times lower, half a percent of the FLOPs would be half of the time. On a CPU
every product is one of fp32 matrices, emulated formats included, and the peak is measured: a large matrix product when the run starts, on the
threads of one rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from model.count import linear_modules, other_products
from parallel.cluster import ClusterConfig, PeakFlops
from train.recipe.clusters import profile
from train.recipe.tree import Recipe

BACKWARD = 2  # FLOPs of a backward pass, in forward passes: dgrad and wgrad
_MEASURED_SIZE = 1024  # rows and columns of the matrices; larger ones are not faster
_MEASURED_SECONDS = 0.15  # and one product more


class Utilisation:
    """Knows the FLOPs of a recipe's step and the peaks of the devices it runs on.

    `line`: for the head of the run, what MFU is measured against, or why there is none.
    """

    def __init__(self, recipe: Recipe, devices: int, cluster: ClusterConfig | None, device: str) -> None:
        self.devices = devices
        self.cluster = cluster
        tokens = recipe.tokens_per_step
        self._linear = (1 + BACKWARD) * tokens * sum(module.flops for module in linear_modules(recipe.model))
        self._other = (1 + BACKWARD) * tokens * sum(one.flops for one in other_products(recipe.model, recipe.train.sequence_length))
        self._compute = recipe.precision.compute
        # The head's FLOPs depend on how many targets there are; a frozen trunk has no backward pass.
        self._counted = not recipe.model.head_at_targets and recipe.train.only is None
        self._frozen = recipe.train.only is not None
        self.line = self._describe(device)

    def flops(self, shares: Mapping[str, float]) -> dict[str, float]:
        """FLOPs of a training step by format. shares: of the linear layers' FLOPs by format, as in the precision table."""
        result = {name: share * self._linear for name, share in shares.items() if share}
        result[self._compute] = result.get(self._compute, 0.0) + self._other
        return result

    def metrics(self, shares: Mapping[str, float], seconds: float) -> dict[str, float]:
        """`mfu` of a step that took `seconds`; nothing where a peak is not known."""
        floor = None if self.cluster is None else self.cluster.peak(self._compute)
        if self.cluster is None or floor is None or not self._counted:
            return {}
        ideal = sum(flops / max(floor, self.cluster.peak(name) or floor) for name, flops in self.flops(shares).items())
        return {"mfu": ideal / self.devices / seconds}

    def _describe(self, device: str) -> str:
        if self._frozen:
            return "MFU: not known, as train.only=mtp leaves most of the backward pass out"
        if not self._counted:
            return "MFU: not known, as model.head_at_targets=true computes the head for some tokens alone"
        if self.cluster is None or self.cluster.peak(self._compute) is None:
            return f"MFU: not known, as the peaks of {device} are not: choose its hardware with cluster=NAME, a file of recipes/cluster"
        if self.cluster.peak_flops.bf16 is None:
            return f"MFU: against {_rate(self.cluster.peak('fp32'))} of {device}, measured on an fp32 matrix product"
        peaks = ", ".join(f"{name} {_rate(self.cluster.peak(name))}" for name in ("bf16", "mxfp8", "nvfp4"))
        return f"MFU: against the peaks of {self.cluster.name}, {peaks}"


def open_utilisation(recipe: Recipe, device: torch.device, devices: int) -> Utilisation:
    """For the devices of this run. On a CPU it measures their peak, in a quarter of a second."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return Utilisation(recipe, devices, profile(recipe.cluster, name), name)
    cluster = ClusterConfig(name="cpu", peak_flops=PeakFlops(fp32=measured_flops()))
    threads = torch.get_num_threads()
    return Utilisation(recipe, devices, cluster, f"{threads} CPU thread{'s' * (threads > 1)}")


def measured_flops() -> float:
    """FLOP/s of an fp32 matrix product on this process's CPU threads: the best of a few. Draws no random number."""
    n = _MEASURED_SIZE
    left, out = torch.linspace(-1.0, 1.0, n * n).view(n, n), torch.empty(n, n)
    best, start = float("inf"), time.perf_counter()
    while (begin := time.perf_counter()) - start < _MEASURED_SECONDS:
        torch.mm(left, left, out=out)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * n**3 / best


def _rate(flops: float | None) -> str:
    assert flops is not None
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if flops >= size:
            return f"{flops / size:.3g} {letter}FLOP/s"
    return f"{flops:.3g} FLOP/s"
