"""What is known of a run beside its recipe before its first step: layout, plan, code. W&B keeps it as configuration."""

import contextlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from model.count import count, linear_modules, other_products
from parallel.layout import Layout
from train.recipe.tree import Recipe
from train.utilisation import BACKWARD

_GIT_SECONDS = 5


def run_facts(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """JSON values; no path, no name of a machine and no secret among them."""
    return {"layout": _layout(layout), "plan": _plan(recipe), "code": code_version()}


def _layout(layout: Layout) -> dict[str, Any]:
    return {
        "ranks": layout.world_size,
        "device": layout.device.type,
        "tensor": layout.tensor_size,
        "expert": layout.expert_size,
        "expert_tensor": layout.expert_tensor_size,
        "pipeline": layout.pipeline_size,
        "data": layout.data_size,
        "context": layout.context_size,
        "text": layout.describe(),
    }


def _plan(recipe: Recipe) -> dict[str, Any]:
    """Sizes and work of the whole run; FLOPs as `train.utilisation` counts them."""
    counted = count(recipe.model)
    forward = sum(module.flops for module in linear_modules(recipe.model))
    forward += sum(one.flops for one in other_products(recipe.model, recipe.train.sequence_length))
    tokens = recipe.total_steps * recipe.tokens_per_step
    return {
        "parameters": counted.parameters + counted.mtp,
        "active_parameters": counted.active,
        "steps": recipe.total_steps,
        "tokens": tokens,
        "tokens_per_step": recipe.tokens_per_step,
        "flops_per_token": float((1 + BACKWARD) * forward),
        "flops": float((1 + BACKWARD) * forward * tokens),
    }


def code_version() -> dict[str, Any]:
    """The package's version and, in a checkout, its commit and whether files differ from it."""
    found: dict[str, Any] = {}
    with contextlib.suppress(PackageNotFoundError):  # run from a checkout that was not installed
        found["version"] = version("nibble")
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
        if commit:
            found |= {"commit": commit, "changed": bool(changes)}
    return found


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
