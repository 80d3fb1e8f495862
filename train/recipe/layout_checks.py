"""Whether a model, its batches and its layout fit together: what mixers declare of their sizes, and what needs more than one group of a recipe.

Each check raises `Misfit` with the keys that could give way; `train.recipe.remedies` finds the values.
"""

import math
from collections.abc import Sequence

from model.mixer import MIXERS
from model.stages import check_parts
from parallel.layout import ParallelConfig
from parallel.misfit import Misfit
from train.evaluation.acceptance import Acceptance
from train.recipe.microbatch import automatic_sizes, check_micro_batch_size
from train.recipe.tree import Recipe


def validate_layout(recipe: Recipe, ranks: int) -> None:
    """Raises ValueError, most of them `Misfit`, for a layout that `ranks` ranks, the model's sizes or its batches do not divide over."""
    recipe.parallel.validate(ranks)
    _validate_samples(recipe)
    for check in (_experts, _stages, _dimensions, _mixers, _sequence, _head):
        check(recipe)
    _batch(recipe, ranks)


def _experts(recipe: Recipe) -> None:
    model, parallel = recipe.model, recipe.parallel
    for key, ranks in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
        if ranks > 1 and not model.has_experts:
            able = [mixer for mixer in MIXERS.values() if mixer.has_experts]
            raise Misfit(
                f"parallel.{key}={ranks} needs {' or '.join(mixer.name for mixer in able)} layers, but model.pattern={model.pattern!r} has no "
                f"{' or '.join(mixer.letter for mixer in able)}",
                f"parallel.{key}",
            )


def _stages(recipe: Recipe) -> None:
    check_parts(recipe.model, recipe.parallel)


def _dimensions(recipe: Recipe) -> None:
    for dimension in recipe.model.dimensions:
        check_multiple(f"model.{dimension.key}", recipe.model.size(dimension.key), dimension.axes, recipe.parallel)


def _mixers(recipe: Recipe) -> None:
    for mixer in recipe.model.used:
        mixer.check_layout(recipe.model.sizes(mixer.sizes), recipe.parallel)


def _sequence(recipe: Recipe) -> None:
    """Every rank of the context group holds as many tokens, and with sequence parallelism so does every one of the tensor group."""
    length, parallel = recipe.train.sequence_length, recipe.parallel
    check_multiple("train.sequence_length", length, ("context", "tensor") if parallel.sequence_parallel else ("context",), parallel)
    if parallel.context == 1:
        return
    for mixer in recipe.model.used:
        if mixer.context_tokens is None:
            raise Misfit(f"parallel.context={parallel.context} cannot split sequences for {mixer.name} layers", "parallel.context")
        if length // parallel.context < (least := mixer.context_tokens(recipe.model.sizes(mixer.sizes))):
            raise Misfit(
                f"parallel.context={parallel.context} leaves a rank {length // parallel.context} of train.sequence_length={length} tokens, but "
                f"{mixer.name} layers need {least}",
                "parallel.context",
                "train.sequence_length",
            )


def _head(recipe: Recipe) -> None:
    tensor = recipe.parallel.tensor
    if recipe.model.head_at_targets and tensor > 1:
        raise Misfit(
            f"model.head_at_targets=true works on the whole vocabulary, but parallel.tensor={tensor} splits it",
            "parallel.tensor",
            otherwise="set model.head_at_targets=false",
        )


def check_multiple(key: str, value: int, axes: Sequence[str], parallel: ParallelConfig) -> None:
    """Raises Misfit where the ranks of these axes cannot share out `value` equally."""
    sizes = {f"parallel.{axis}": getattr(parallel, axis) for axis in axes if getattr(parallel, axis) > 1}
    ranks = math.prod(sizes.values())
    if value % ranks:
        product = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        product += f" = {ranks}" if len(sizes) > 1 else ""
        raise Misfit(f"{key}={value} is not a multiple of {product}", *sizes, key)


def _batch(recipe: Recipe, ranks: int) -> None:
    train, data_ranks = recipe.train, recipe.parallel.data(ranks)
    share, remainder = divmod(train.global_batch_size, data_ranks)
    if remainder or share < 1:
        raise Misfit(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of the {data_ranks} data-parallel ranks of this run",
            "train.global_batch_size",
            "ranks",
        )
    if train.micro_batch_size != "auto":
        check_micro_batch_size(recipe, ranks, train.micro_batch_size)
    elif next(automatic_sizes(recipe, ranks), None) is None:
        check_micro_batch_size(recipe, ranks, 1)


def _validate_samples(recipe: Recipe) -> None:
    """Texts are made by ranks that hold whole layers and whole sequences."""
    samples, evaluation = recipe.monitor.samples, recipe.evaluation
    acceptance = evaluation.known["acceptance"] if "acceptance" in evaluation.evaluators else None
    if samples.every:
        key = f"monitor.samples.every={samples.every}"
    elif isinstance(acceptance, Acceptance) and acceptance.length_every:
        key = f"evaluation.acceptance.length_every={acceptance.length_every}"
    else:
        return
    split = [name for name in ("tensor", "pipeline", "context") if getattr(recipe.parallel, name) > 1]
    split += ["zero_stage"] if recipe.parallel.zero_stage == 3 else []
    if split:
        raise ValueError(
            f"{key} asks for texts, which a model split by parallel.{split[0]}={getattr(recipe.parallel, split[0])} cannot make while it is "
            "trained: set it to 0 and make texts of checkpoints with python -m train.generate, or divide data and experts alone"
        )
