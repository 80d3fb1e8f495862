"""Whether every module can run the formats it will be asked for."""

from model.count import LinearModule, linear_modules
from model.precision.formats.base import Format, Use
from model.precision.gemm import GEMMS, Gemm
from train.recipe.tree import Recipe


def validate_precision(recipe: Recipe) -> None:
    """Every module must be able to run every format it will be asked for, at any time of the run. Raises ValueError, in one sentence."""
    policy = recipe.policy
    modules = linear_modules(recipe.model, recipe.parallel.tensor, recipe.parallel.expert_tensor)
    policy.check([module.name for module in modules])
    for time in policy.times:
        for module in modules:
            asked: dict[Format, tuple[Gemm, ...]] = {}
            for gemm, form in zip(GEMMS, policy.formats(module.name, time), strict=True):
                asked[form] = (*asked.get(form, ()), gemm)
            for form, gemms in asked.items():
                form.check(_use(recipe, module, gemms))


def _use(recipe: Recipe, module: LinearModule, gemms: tuple[Gemm, ...]) -> Use:
    tokens = recipe.micro_batch_size * recipe.train.sequence_length
    if module.sequence_split and recipe.parallel.sequence_parallel:
        tokens //= recipe.parallel.tensor
    router = module.name.endswith(".gate")
    return Use(module.name, gemms, module.rows, module.columns, tokens, routed=module.routed, router=router)
