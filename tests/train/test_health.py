"""Health telemetry in a run: what is logged, that it changes nothing, and that ranks see one operand."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import groups
from tests.train.recipes import recipe
from tests.train.test_resume import DETERMINISTIC
from train import loop
from train.checkpoint.reader import open_checkpoint
from train.observe.metrics import read_metrics
from train.report.report import write_report
from train.train_step import train_step

OPERAND = ("sqnr_db", "underflow", "clipped", "bias", "scale_zero", "scale_saturated", "scale_p05", "scale_p50", "scale_p95")
LENGTH = ("train.steps=12", "optimizer.decay=4", "train.log_every=4")


def health_of(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key.startswith(("precision/", "residual/")) and "/share/" not in key}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "measured"
    assert loop.run(recipe(*LENGTH, "monitor.quantization.every=5", f"run.dir={run_dir}")) == 0
    return run_dir


def test_every_quantised_operand_is_measured_at_its_steps(measured: Path) -> None:
    metrics = {m["step"]: m for m in read_metrics(measured)}
    assert list(metrics) == [1, 4, 5, 8, 10, 12]
    assert [step for step, m in metrics.items() if health_of(m)] == [5, 10]
    found = health_of(metrics[10])
    assert found.keys() == health_of(metrics[5]).keys()
    # One NVFP4 and one MXFP8 module; the latter's weight has no tiles, so dgrad has its own.
    for module, operands in (
        ("layers.0.mixer.in_proj", ("x", "x_t", "w", "dy", "dy_t")),
        ("layers.0.mixer.out_proj", ("x", "x_t", "w", "w_t", "dy", "dy_t")),
        ("layers.1.mixer.experts.up_proj", ("x", "x_t", "w", "dy", "dy_t")),
    ):
        names = {f"precision/{module}/{operand}/{name}" for operand in operands for name in OPERAND} | {f"precision/{module}/wgrad/zero"}
        assert {key for key in found if key.startswith(f"precision/{module}/")} == names
    assert not any("qkv_proj" in key or "lm_head" in key or "gate" in key for key in found)  # bf16, fp32
    layers = [f"layers.{i}" for i in range(7)]
    assert {key.split("/")[1] for key in found if key.startswith("residual/")} == set(layers)
    assert 12 < found["precision/layers.0.mixer.in_proj/x/sqnr_db"] < 25 < found["precision/layers.0.mixer.out_proj/x/sqnr_db"] < 35
    for layer in layers:
        assert found[f"residual/{layer}/rms"] > 0 and found[f"residual/{layer}/outlier_ratio"] > 1
        assert found[f"residual/{layer}/outlier_position"] in range(64) and found[f"residual/{layer}/outlier_feature"] in range(32)


def test_measuring_changes_nothing(measured: Path, tmp_path: Path) -> None:
    assert loop.run(recipe(*LENGTH, "monitor.quantization.every=0", f"run.dir={tmp_path / 'off'}")) == 0
    off = {m["step"]: m for m in read_metrics(tmp_path / "off")}
    on = {m["step"]: m for m in read_metrics(measured)}
    assert list(off) == [1, 4, 8, 12] and not any(health_of(m) for m in off.values())
    for step, metrics in off.items():
        assert [metrics[key] for key in DETERMINISTIC] == [on[step][key] for key in DETERMINISTIC], step
    ours, theirs = open_checkpoint(measured), open_checkpoint(tmp_path / "off")
    assert ours.manifest.tensors.keys() == theirs.manifest.tensors.keys()
    for name in ours.manifest.tensors:
        assert torch.equal(ours.read_full(name), theirs.read_full(name)), name


def test_a_resumed_run_measures_the_same_steps(measured: Path, tmp_path: Path) -> None:
    given = (*LENGTH, "monitor.quantization.every=5", f"run.dir={tmp_path / 'run'}")
    assert loop.run(recipe(*given, "run.stop_after=7")) == 0
    assert loop.run(recipe(*given)) == 0
    ours = {m["step"]: health_of(m) for m in read_metrics(tmp_path / "run")}
    theirs = {m["step"]: health_of(m) for m in read_metrics(measured)}
    assert ours[5] == theirs[5] and ours[10] == theirs[10] and ours[10]


def test_the_report_shows_it(measured: Path, tmp_path: Path) -> None:
    page = write_report([measured], tmp_path / "report").read_text()
    for name in ("sqnr", "underflow", "clipped", "bias", "zero_scales", "zero_gradients", "residual"):
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 10_000
    assert "Residual stream" in page and "Underflow" in page


def first_step(rank: int, overrides: tuple[str, ...]) -> dict[str, float]:
    made = loop.build(recipe(*overrides, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    try:
        return health_of(train_step(made, 0))
    finally:
        groups.shutdown(leave_world=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "micro", "extra"), [("pipeline", 8, ("parallel.pipeline=2",)), ("data", 4, ())])
def test_two_ranks_see_what_one_sees(ranks: Callable[[int], Callable[..., Any]], name: str, micro: int, extra: tuple[str, ...]) -> None:
    """MXFP8 has no scale of a whole operand, so shares of the batch are quantised alike."""
    common = ("precision=mxfp8", "monitor.quantization.every=1")
    (alone,) = ranks(1)(first_step, (*common, "train.micro_batch_size=8"))
    both = ranks(2)(first_step, (*common, f"train.micro_batch_size={micro}", *extra))
    assert both[0] == both[1]
    assert both[0].keys() == alone.keys() and len(alone) > 100
    for key, value in alone.items():
        # Half a batch on each rank: blocks along tokens begin elsewhere, and the first of equal maxima may be another.
        if name == "data" and ("_t/" in key or ".experts." in key or key.endswith(("wgrad/zero", "outlier_position", "outlier_feature"))):
            continue
        assert both[0][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
