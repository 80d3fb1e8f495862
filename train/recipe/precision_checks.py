"""Whether every module can run the formats it will be asked for."""

from model.count import LinearModule, linear_modules
from model.precision.formats.base import Format, Unfit, Use
from model.precision.gemm import GEMMS, Gemm
from parallel.misfit import Misfit
from train.recipe.tree import Recipe


def validate_precision(recipe: Recipe) -> None:
    """Every module must be able to run every format it will be asked for, at any time of the run. Raises ValueError, in one sentence, or Misfit
    where other sizes on a rank would do."""
    policy = recipe.policy
    modules = linear_modules(recipe.model, recipe.parallel.tensor, recipe.parallel.expert_tensor)
    policy.check([module.name for module in modules])
    for time in policy.times:
        for module in modules:
            asked: dict[Format, tuple[Gemm, ...]] = {}
            for gemm, form in zip(GEMMS, policy.formats(module.name, time), strict=True):
                asked[form] = (*asked.get(form, ()), gemm)
            for form, gemms in asked.items():
                try:
                    form.check(_use(recipe, module, gemms))
                except Unfit as unfit:
                    keys = _keys(recipe, module, unfit)
                    raise Misfit(_sentence(recipe, keys, unfit.what), *keys, otherwise=unfit.remedy) from None


def _use(recipe: Recipe, module: LinearModule, gemms: tuple[Gemm, ...]) -> Use:
    tokens = recipe.micro_batch_size * recipe.train.sequence_length // recipe.parallel.context
    if module.sequence_split and recipe.parallel.sequence_parallel:
        tokens //= recipe.parallel.tensor
    router = module.name.endswith(".gate")
    return Use(module.name, gemms, module.rows, module.columns, tokens, routed=module.routed, router=router)


def _keys(recipe: Recipe, module: LinearModule, unfit: Unfit) -> list[str]:
    """Of the recipe, on which the size of that operand on one rank depends; a model's own sizes apart, which stand in the sentence."""
    parallel, keys = recipe.parallel, []
    if unfit.operand == "weight":
        keys = ["parallel.expert_tensor" if module.routed else "parallel.tensor"]
    if unfit.operand == "tokens":
        keys = ["train.micro_batch_size", "train.sequence_length", "parallel.context"]
        keys += ["parallel.tensor"] if parallel.sequence_parallel and module.sequence_split else []
    return [key for key in keys if not key.startswith("parallel.") or getattr(parallel, key.removeprefix("parallel.")) > 1]


def _sentence(recipe: Recipe, keys: list[str], what: str) -> str:
    if not keys:
        return what
    given = [f"{key}={getattr(getattr(recipe, group), name)}" for key in keys for group, name in [key.split(".")]]
    return f"with {' and '.join(given)}, {what}"
