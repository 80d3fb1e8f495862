"""MFU against what pencil and paper give, and the measured peak of a CPU."""

import time
from pathlib import Path

import pytest
import torch

from model.count import linear_modules, other_products
from parallel.cluster import ClusterConfig, PeakFlops
from tests.train.recipes import recipe
from train import loop
from train.observe.metrics import read_metrics
from train.utilisation import Utilisation, measured_flops

TOKENS = 8 * 64  # of a step of the small recipe


def forward() -> tuple[float, float]:
    """FLOPs per token of linear layers, and of attention and SSD."""
    model = recipe().model
    return sum(module.flops for module in linear_modules(model)), sum(one.flops for one in other_products(model, 64))


def test_one_format_is_the_usual_definition() -> None:
    linear, other = forward()
    used = Utilisation(recipe("precision=fp32"), 4, ClusterConfig(peak_flops=PeakFlops(fp32=1e12)), "x")
    mfu = used.metrics({"fp32": 1.0}, seconds=0.5)["mfu"]
    assert mfu == pytest.approx(3 * TOKENS * (linear + other) / (0.5 * 4 * 1e12))


def test_every_format_counts_at_its_own_peak_and_none_below_that_of_the_activations() -> None:
    linear, other = forward()
    peaks = ClusterConfig(peak_flops=PeakFlops(fp32=1e12, bf16=2e13, mxfp8=4e13, nvfp4=8e13))
    shares = {"nvfp4": 0.6, "bf16": 0.3, "fp32": 0.1}
    slow = Utilisation(recipe("precision.compute=fp32"), 1, peaks, "x").metrics(shares, 1.0)["mfu"]
    assert slow == pytest.approx(3 * TOKENS * (linear * (0.6 / 8e13 + 0.3 / 2e13 + 0.1 / 1e12) + other / 1e12))
    fast = Utilisation(recipe("precision.compute=bf16"), 1, peaks, "x").metrics(shares, 1.0)["mfu"]
    assert fast == pytest.approx(3 * TOKENS * (linear * (0.6 / 8e13 + 0.4 / 2e13) + other / 2e13))


def test_flops_by_format_are_those_of_the_whole_step() -> None:
    linear, other = forward()
    flops = Utilisation(recipe(), 1, None, "x").flops({"nvfp4": 0.75, "fp32": 0.25, "mxfp8": 0.0})
    assert flops == pytest.approx({"nvfp4": 0.75 * 3 * TOKENS * linear, "fp32": 3 * TOKENS * (0.25 * linear + other)})


def test_an_unknown_gpu_has_no_mfu_and_is_told_what_to_set() -> None:
    unknown = Utilisation(recipe(), 1, None, "NVIDIA T4")
    assert unknown.metrics({"nvfp4": 1.0}, 1.0) == {}
    assert "NVIDIA T4" in unknown.line and "cluster=NAME" in unknown.line


def test_the_measured_peak_is_that_of_a_product_and_costs_little() -> None:
    state = torch.get_rng_state()
    start = time.perf_counter()
    peak = measured_flops()
    assert time.perf_counter() - start < 2.0  # a quarter of a second on a machine that does nothing else
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(512, 512)
    begin = time.perf_counter()
    for _ in range(10):
        x @ x
    assert 0.5 < peak * (time.perf_counter() - begin) / (10 * 2 * 512**3) < 50  # a small product is slower, a busy machine much slower


def test_a_run_logs_it_and_says_against_what(tmp_path: Path) -> None:
    assert loop.run(recipe("train.steps=2", "optimizer.warmup=1", "optimizer.decay=1", f"run.dir={tmp_path / 'run'}")) == 0
    assert all(0 < entry["mfu"] < 1 for entry in read_metrics(tmp_path / "run"))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "measured on an fp32 matrix product" in log and "  mfu " in log
