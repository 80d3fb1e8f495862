"""A recipe made real on this rank: process groups, data, model, engine."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from data.text_data import TextData, open_data
from model.context import ModelContext
from model.count import linear_modules
from model.fused_exchange import check_dispatcher
from model.hybrid import HybridModel
from model.precision.backends.choice import check
from model.precision.health import Health
from model.stages import parts_of_stage, pipeline_parts
from parallel import groups
from parallel.engine import Engine
from parallel.engines import open_engine
from parallel.layout import Layout
from train.optimizer import open_optimizer
from train.recipe.reading import RecipeError
from train.recipe.tree import Recipe
from train.step import BatchPlan


@dataclass
class Run:
    """A recipe made real on this rank."""

    recipe: Recipe
    layout: Layout
    data: TextData
    context: ModelContext
    chunks: list[HybridModel]  # of this rank: one, or several with a virtual pipeline
    engine: Engine
    plan: BatchPlan
    run_dir: Path

    @property
    def sequence_length(self) -> int:
        return self.recipe.train.sequence_length

    @property
    def micro_batch_size(self) -> int:
        return self.recipe.micro_batch_size

    @property
    def mtp_depths(self) -> int:
        return self.recipe.model.mtp_depths

    def progress(self, step: int) -> float:
        """The fraction of the run that is done after `step` steps; it decides the formats."""
        return min(step / self.recipe.total_steps, 1.0)


def params_dtype(recipe: Recipe) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision.compute]


def repeatable() -> None:
    """Makes a step that is repeated give the same bits on a GPU: attention's and the embedding's gradients are then added up in a fixed order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # an operation without such a form says so, and runs
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written


def build(recipe: Recipe, layout: Layout | None = None, data: TextData | None = None) -> Run:
    """Data, model and engine, on a layout that stands or on one that is made here, with data that are open or are opened here.

    Raises ValueError, in one sentence, for what only shows when files are opened.
    """
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    precision, modules = recipe.precision, [module.name for module in linear_modules(recipe.model)]
    formats = recipe.policy.ever(modules)
    try:
        check_dispatcher(recipe.parallel.dispatcher, torch.device(wanted), precision.compute)
        check(precision.backend, torch.device(wanted), formats, compute=precision.compute, amax_scope=precision.amax_scope)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    data = data or _opened(recipe)
    for evaluator in recipe.evaluation.chosen().values():
        try:
            evaluator.check(data, recipe.train.sequence_length)
        except ValueError as error:
            raise RecipeError(str(error)) from None
    layout = layout or groups.initialize(recipe.parallel, recipe.run.seed)
    if layout.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        repeatable()
    context, chunks = build_model(recipe, layout)
    engine = open_engine(recipe.parallel.engine, chunks, layout, context.sizes, open_optimizer(recipe.optimizer))
    plan = BatchPlan(recipe.train.global_batch_size, recipe.micro_batch_size, layout.data_rank, layout.data_size)
    return Run(recipe, layout, data, context, chunks, engine, plan, Path(recipe.run_dir))


def _opened(recipe: Recipe) -> TextData:
    data = open_data(recipe.data, sequence_length=recipe.train.sequence_length, seed=recipe.run.seed)
    if data.tokenizer.vocab_size > recipe.model.vocab_size:
        raise RecipeError(
            f"model.vocab_size={recipe.model.vocab_size} is smaller than the tokenizer's {data.tokenizer.vocab_size} tokens: set "
            f"model.vocab_size to at least {data.tokenizer.vocab_size}"
        )
    return data


def build_model(recipe: Recipe, layout: Layout) -> tuple[ModelContext, list[HybridModel]]:
    """The model chunks of one rank, on its layout's device."""
    context = ModelContext(
        recipe.model,
        layout,
        recipe.policy,
        recipe.run.seed,
        params_dtype(recipe),
        layout.device,
        recipe.train.global_batch_size,
        health=Health(recipe.monitor.quantization.modules),
    )
    parts = pipeline_parts(recipe.model, recipe.parallel, recipe.train.sequence_length)
    chunks = [HybridModel(context, part) for part in parts_of_stage(parts, layout.pipeline_size, layout.pipeline_rank)]
    if recipe.train.only == "mtp":
        for chunk in chunks:
            chunk.freeze_trunk()
    return context, chunks
