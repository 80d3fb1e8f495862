"""What is patched must exist in the pinned Megatron."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.megatron import cpu


@pytest.mark.parametrize("path", cpu.LITERAL_CUDA)
def test_the_module_still_writes_cuda_literally(path: str) -> None:
    source = Path(str(importlib.import_module(path).__file__)).read_text()
    assert 'device="cuda"' in source or "device='cuda'" in source or "'torch.cuda." in source


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("megatron.core.optimizer.optimizer", "clip_grad_by_total_norm_fp32"),
        ("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu"),
    ],
)
def test_the_replaced_function_has_the_same_arguments(module: str, name: str) -> None:
    original = getattr(
        importlib.import_module({"clip_grad_by_total_norm_fp32": "megatron.core.optimizer.clip_grads"}.get(name, module)), name
    )
    ours: Any = {"clip_grad_by_total_norm_fp32": cpu.clip_by_norm, "maybe_move_tensor_to_cpu": cpu.on_host}[name]
    if original is ours:
        original = getattr(importlib.import_module("megatron.core.transformer.moe.moe_utils"), name)
    assert list(inspect.signature(original).parameters) == list(inspect.signature(ours).parameters)


@pytest.mark.parametrize("name", cpu.CUDA_FUNCTIONS)
def test_torch_cuda_has_the_name(name: str) -> None:
    assert hasattr(torch.cuda, name)


def test_factories_asked_for_cuda_allocate_on_the_cpu() -> None:
    view = cpu.TorchOnCpu()
    assert view.zeros(2, device="cuda").device.type == "cpu"
    assert view.tensor([1.0], device="cuda").device.type == "cpu"
    assert view.float32 is torch.float32


def test_clipping() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    for param in params:
        param.grad = torch.ones_like(param)
    cpu.clip_by_norm(params, 1.0, 5**0.5)
    torch.testing.assert_close(torch.cat([p.grad for p in params if p.grad is not None]).norm(), torch.tensor(1.0))
    before = [p.grad.clone() for p in params if p.grad is not None]
    cpu.clip_by_norm(params, 10.0, 1.0)
    assert all(p.grad is not None and torch.equal(a, p.grad) for a, p in zip(before, params, strict=True))
