"""Bytes a token leaves behind in each kind of layer for the backward pass, kept and computed again (`parallel.recompute`).

    python -m benchmarks.activations                                  # the layers of small, in NVFP4 with bf16 activations
    python -m benchmarks.activations recipe=tiny compute=fp32 precision=bf16 tokens=256

Counted is every piece of memory that a forward pass of the layer makes and that still lives when it has returned, but its result: whatever holds it.
Quantised weights are made before, since a step makes them once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.arguments import main
from benchmarks.timing import machine, save, table
from model.batch import Microbatch
from model.context import ModelContext
from model.hybrid import HybridModel
from model.recompute import Recompute
from parallel import groups
from train.build import params_dtype
from train.recipe.load import RECIPES, load_recipe

PARTS = ("norm", "activation", "moe", "mamba", "head")
CHOICES: tuple[tuple[str, ...], ...] = ((), *((kind,) for kind in PARTS), PARTS, ("layer", "norm", "head"))


class Living(TorchDispatchMode):
    """Bytes of the memory made inside, as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = {StorageWeakRef(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if (reference := StorageWeakRef(storage)) not in before:
                    self._made[reference] = storage.nbytes()
        return result

    def bytes(self, *but: Tensor) -> int:
        """Of what lives, without the memory of these tensors."""
        others = {StorageWeakRef(each.untyped_storage()) for each in but}
        return sum(size for reference, size in self._made.items() if not reference.expired() and reference not in others)


def left_behind(function: Callable[[], Tensor]) -> int:
    """Bytes that `function` makes and that live while its result does, without the result."""
    with Living() as living:
        result = function()
    return living.bytes(result)


@contextmanager
def model_of(name: str, *overrides: str) -> Iterator[tuple[HybridModel, ModelContext]]:
    """The model of a recipe on one rank."""
    recipe = load_recipe(name, *overrides)
    layout = groups.initialize(recipe.parallel, recipe.run.seed)
    try:
        context = ModelContext(recipe.model, layout, recipe.policy, recipe.run.seed, params_dtype(recipe), layout.device)
        yield HybridModel(context).train(), context
    finally:
        groups.shutdown()


def pieces(model: HybridModel, context: ModelContext, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """One layer of each kind, and the head with its loss: what runs its forward pass."""
    depths = context.config.mtp_depths
    draw = torch.randint(context.config.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    batch = Microbatch.of(
        tokens=draw[:, :-1],
        labels=draw[:, 1:],
        loss_mask=torch.ones(1, tokens, dtype=torch.bool),
        documents=torch.zeros(1, tokens, dtype=torch.int32),
        reset=False,
        sample=torch.zeros(1, dtype=torch.int64),
        step=0,
        depths=depths,
    ).to(context.device)
    x = torch.randn(tokens, 1, context.config.hidden_size).to(context.device, context.params_dtype).requires_grad_()
    found: dict[str, Callable[[], Tensor]] = {}
    for layer in model.layers.values():
        kind: Any = layer
        found.setdefault(kind.kind.name, lambda layer=kind: layer(x, batch))  # type: ignore[misc]
    found["head"] = lambda: model.head_loss(x, batch)
    return found


def run(recipe: str, precision: str, compute: str, tokens: int, to: str) -> None:
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if recipe not in known:
        raise ValueError(f"recipe={recipe} is no recipe: use one of {', '.join(known)}")
    overrides = (f"precision={precision}", f"precision.compute={compute}", f"train.sequence_length={tokens}", "train.micro_batch_size=1")
    measured: dict[str, dict[str, float]] = {}
    with model_of(recipe, *overrides) as (model, context):
        for kind, forward in pieces(model, context, tokens).items():
            forward()  # quantises weights
            measured[kind] = {}
            for kinds in CHOICES:
                context.recompute = Recompute(kinds)
                measured[kind][", ".join(kinds) or "nothing"] = left_behind(forward) / tokens
        print(
            f"Bytes a token leaves behind, {recipe} in {precision} with {compute} activations, {tokens} tokens, {machine(context.device)}\n"
        )
    names = list(next(iter(measured.values())))
    print(table([("computed again", *measured), *((name, *(f"{measured[kind][name]:,.0f}" for kind in measured)) for name in names)]))
    save(to, {"recipe": recipe, "precision": precision, "compute": compute, "tokens": tokens, "bytes_per_token": measured})


DEFAULTS = {"recipe": "small", "precision": "nvfp4", "compute": "bf16", "tokens": 512, "to": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
