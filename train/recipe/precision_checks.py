"""Whether every module can run the formats it will be asked for."""

from model.count import linear_modules
from train.recipe.tree import Recipe


def validate_precision(recipe: Recipe) -> None:
    """Every module must be able to run every format it will be asked for, at any time of the run."""
    model, precision, parallel = recipe.model, recipe.precision, recipe.parallel
    policy = recipe.policy
    modules = linear_modules(model, parallel.tensor)
    policy.check([module.name for module in modules])
    tokens = recipe.micro_batch_size * recipe.train.sequence_length
    for time in policy.times:
        for module in modules:
            formats = dict(zip(("fprop", "dgrad", "wgrad"), policy.formats(module.name, time), strict=True))
            names = {form.name for form in formats.values()}
            if module.name.endswith(".gate") and names - {"fp32", "bf16"}:
                raise ValueError(
                    f"precision asks for {'/'.join(sorted(names - {'fp32', 'bf16'}))} in the router {module.name}: routers run in fp32 or bf16 "
                    "only, so add a rule with modules=['*.gate'] and format=fp32"
                )
            nvfp4 = {gemm for gemm, form in formats.items() if form.name == "nvfp4"}
            options = precision.nvfp4
            if nvfp4 & {"fprop", "dgrad"} and options.weight_scaling == "2d" and (module.rows % 16 or module.columns % 16):
                raise ValueError(
                    f"precision asks for nvfp4 in {module.name}, whose weight on one rank is {module.rows} x {module.columns}: 2d scaling "
                    "needs multiples of 16, so change model sizes, set precision.nvfp4.weight_scaling=1d, or give it another format"
                )
            local = tokens // parallel.tensor if module.sequence_split and parallel.sequence_parallel else tokens
            if "wgrad" in nvfp4 and options.hadamard and not module.routed and local % 16:
                raise ValueError(
                    f"train.micro_batch_size={recipe.micro_batch_size} times train.sequence_length={recipe.train.sequence_length} "
                    f"gives {module.name} {local} tokens, but the Hadamard transform of its wgrad works on groups of 16: use a multiple "
                    "of 16 or precision.nvfp4.hadamard=false"
                )


def validate_transformer_engine(recipe: Recipe) -> None:
    """Raises ValueError for what Transformer Engine cannot do, where it is there."""
    precision, policy = recipe.precision, recipe.policy
    modules = linear_modules(recipe.model)
    nvfp4 = any("nvfp4" in map(str, policy.formats(module.name, time)) for module in modules for time in policy.times)
    if nvfp4 and precision.nvfp4.hadamard and precision.compute != "bf16":
        raise ValueError(
            f"precision.compute={precision.compute} with precision.backend=transformer_engine cannot rotate operands, which Transformer Engine does "
            "in bf16 only: use precision.compute=bf16, precision.nvfp4.hadamard=false or precision.backend=triton"
        )
    if nvfp4 and precision.nvfp4.row_scaled and precision.amax_scope == "tensor_parallel":
        raise ValueError(
            "precision.amax_scope=tensor_parallel with precision.nvfp4.row_scaled=true cannot run with precision.backend=transformer_engine, which "
            "takes the amax of every row itself: use precision.amax_scope=local or precision.backend=triton"
        )
