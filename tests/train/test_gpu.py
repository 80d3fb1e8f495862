"""On a CUDA machine the same commands use NCCL, bf16 compute and the GPU. Run with `make test-gpu`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import groups
from tests.train.recipes import SMALL, recipe
from tests.train.test_resume import DETERMINISTIC
from train import loop
from train.checkpoint.reader import open_checkpoint
from train.observe.metrics import read_metrics
from train.train_step import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16 = ("precision.compute=bf16",)


@pytest.mark.parametrize("precision", ["nvfp4", "mxfp8", "bf16"])
def test_a_step_runs_on_the_gpu_in_bf16(precision: str) -> None:
    made = loop.build(recipe(f"precision={precision}"))  # bf16 is what precision.compute=auto means here
    try:
        assert torch.distributed.get_backend() == "nccl"
        assert {p.device.type for p in made.chunks[0].parameters()} == {"cuda"}
        assert {p.dtype for p in made.chunks[0].parameters()} == {torch.bfloat16}
        losses = [train_step(made, step)["loss/lm"] for step in range(20)]
        assert losses[0] == pytest.approx(5.6, abs=0.2) and losses[-1] < losses[0] - 0.5
        states = list(made.engine.parameter_states())
        assert all(s.master is not None and s.master.dtype == torch.float32 for s in states)
        gradients: list[Any] = list(made.chunks[0].parameters())
        assert all(p.main_grad.dtype == torch.float32 for p in gradients)
    finally:
        groups.shutdown()


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("precision", ["nvfp4", "bf16"])
def test_a_repeated_run_has_the_same_bits(precision: str, documents: bool) -> None:
    """Also when activations are computed again."""
    runs = []
    for recompute in ("[]", "[]", "[norm,activation,moe,head,mamba]", "[layer,norm,head]"):
        overrides = (f"precision={precision}", f"parallel.recompute={recompute}", f"data.reset_at_document={str(documents).lower()}", *BF16)
        made = loop.build(recipe(*overrides))
        try:
            metrics = [train_step(made, step) for step in range(3)]
            runs.append((metrics, [param.detach().cpu() for param in made.chunks[0].parameters()]))
        finally:
            groups.shutdown()
    for metrics, weights in runs[1:]:
        assert metrics == runs[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, runs[0][1], strict=True))


def test_the_gpu_computes_what_the_cpu_computes(tmp_path: Path) -> None:
    length = ("train.steps=5", "optimizer.warmup=2", "optimizer.decay=1", "precision=fp32", "precision.compute=fp32")
    command = [sys.executable, "-m", "train", "-cn", "tiny", *SMALL, *length, f"run.dir={tmp_path / 'cpu'}"]
    subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert loop.run(recipe(*length, f"run.dir={tmp_path / 'gpu'}")) == 0
    for ours, theirs in zip(read_metrics(tmp_path / "gpu"), read_metrics(tmp_path / "cpu"), strict=True):
        assert ours["loss/lm"] == pytest.approx(theirs["loss/lm"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_resume_continues_the_run(tmp_path: Path) -> None:
    length = ("train.steps=12", "optimizer.warmup=2", "optimizer.decay=4", *BF16)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert loop.run(recipe(*length, f"run.dir={whole}")) == 0
    assert loop.run(recipe(*length, f"run.dir={halves}", "run.stop_after=6steps")) == 0
    assert loop.run(recipe(*length, f"run.dir={halves}")) == 0
    ours, theirs = ([{k: m[k] for k in DETERMINISTIC} for m in read_metrics(d)] for d in (halves, whole))
    assert ours == theirs
    assert any(name.startswith("master/") for name in open_checkpoint(halves).manifest.tensors)
