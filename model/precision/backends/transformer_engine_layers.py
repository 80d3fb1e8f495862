"""Transformer Engine's own linear layers, entered with a recipe of its own, where one recipe can say what a module's formats ask for.

A recipe holds for a whole module. Ours become one field by field (`translate`); what a recipe cannot express is a ValueError that names the
module and the option (`arguments`), and `model.precision.backends.transformer_engine` then runs that module operand by operand.

    one format in all three GEMMs                    its recipe class; without clipping=4over6_* and row_scaled, which mean fprop alone
    a format in fprop, bf16 in dgrad and wgrad       the same with backward_override="high_precision"
    nothing quantised                                no recipe: our own GEMMs

Source: TE 2.20.2, `common/recipe/__init__.py`, `pytorch/module/linear.py`, `pytorch/module/base.py`.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from model.precision.backend import Asked

Formats = tuple[Asked, Asked, Asked]

ALIGNED = 32  # of tokens and features: FP4 GEMMs load 16 bytes, MXFP8 blocks are 32 long; what is not is padded operand by operand


def translate(form: Asked) -> dict[str, Any]:
    """Keyword arguments of TE's recipe class for a format: of NVFP4BlockScaling, or of MXFP8BlockScaling.

    Every option is written down, for TE takes the defaults of most from environment variables. Raises ValueError for formats that need no
    recipe.
    """
    unquantised = {"fp8_dpa": False, "fp8_mha": False, "backward_override": None}  # attention; None: backward in the same format
    if form.name == "mxfp8":
        return {"margin": 0, "enable_2d_quantization": False, **unquantised}
    if form.name == "nvfp4":
        options = form.options
        return {
            "disable_rht": not options.hadamard,
            "disable_stochastic_rounding": not options.stochastic_rounding,
            "disable_2d_quantization": options.weight_scaling == "1d",
            "row_scaled_activation": options.row_scaled,
            "nvfp4_4over6": "none" if options.clipping == "saturate" else "all",
            "nvfp4_4over6_e4m3_use_256": "all" if options.e4m3_bound == 256 else "none",
            "nvfp4_4over6_err_mode": "MSE" if options.clipping == "4over6_mse" else "MAE",
            **unquantised,
        }
    raise ValueError(f"{form.name} is no quantised format: Transformer Engine runs it without a recipe")


def arguments(formats: Formats, module: str) -> tuple[str, dict[str, Any]] | None:
    """TE's recipe class and its arguments for the fprop, dgrad and wgrad of a module; None: no recipe, nothing is quantised.

    Raises ValueError, naming the module and the option, for what one recipe cannot express. bf16 in the backward pass means operands as
    they come, that is with precision.compute=bf16.
    """
    fprop, dgrad, wgrad = formats
    if all(form.name in ("fp32", "bf16") for form in formats):
        return None
    names = f"{fprop.name} in fprop, {dgrad.name} in dgrad and {wgrad.name} in wgrad"
    whole = fprop == dgrad == wgrad
    # TE's only other choice: a forward pass in the format, and a backward pass from unquantised operands.
    forward_only = fprop.name in ("mxfp8", "nvfp4") and dgrad.name == wgrad.name == "bf16"
    if not whole and not forward_only:
        raise ValueError(
            f"{module}: precision.rules gives {names}, but a Transformer Engine recipe holds for a whole module: "
            "use one format, bf16 for both backward GEMMs, or precision.backend=triton"
        )
    if whole and fprop.name == "nvfp4":
        for option, value, off in (
            ("clipping", fprop.options.clipping, "saturate"),
            ("row_scaled", fprop.options.row_scaled, False),
        ):
            if value != off:
                raise ValueError(
                    f"{module}: precision.nvfp4.{option}={value} is meant for fprop alone, but a Transformer Engine recipe would apply it to "
                    f"wgrad's operand too: use {option}={str(off).lower()}, bf16 for both backward GEMMs, or precision.backend=triton"
                )
    given = translate(fprop)
    if forward_only:
        given["backward_override"] = "high_precision"
        if fprop.name == "nvfp4":
            given["disable_rht"] = True  # of wgrad operands; and TE refuses it beside 4over6, used or not
    return {"nvfp4": "NVFP4BlockScaling", "mxfp8": "MXFP8BlockScaling"}[fprop.name], given


def expressible(formats: Formats, module: str) -> bool:
    """Whether a module quantises, and one recipe says how."""
    try:
        return arguments(formats, module) is not None
    except ValueError:
        return False


def recipe(formats: Formats, module: str) -> Any:
    """The TE recipe object of `arguments`, or None; for `transformer_engine.pytorch.autocast(recipe=...)`."""
    wanted = arguments(formats, module)
    if wanted is None:
        return None
    return getattr(importlib.import_module("transformer_engine.common.recipe"), wanted[0])(**wanted[1])


class Layer:
    """TE's linear layer over a weight of ours, with one recipe."""

    def __init__(self, te: Any, weight: Tensor, recipe: Any) -> None:
        outputs, inputs = weight.shape
        self._te, self._recipe, self._weight = te, recipe, weight
        # On "meta" TE makes no weight of its own; ours takes its place.
        self._module = te.Linear(inputs, outputs, bias=False, params_dtype=weight.dtype, device="meta")
        self._module.weight = weight

    def __call__(self, x: Tensor, *, new_weight: bool) -> Tensor:
        """x bf16 [tokens, K] -> bf16 [tokens, N]. new_weight: it has changed since the last call, so it is quantised again.

        Its gradient is added in fp32 to `weight.main_grad` where that exists.
        """
        module = self._module
        if new_weight:
            module._fp8_workspaces.clear()  # where TE keeps the quantised weight
        module.fuse_wgrad_accumulation = getattr(self._weight, "main_grad", None) is not None
        with torch.cuda.device_of(x), self._te.autocast(enabled=True, recipe=self._recipe):
            # False: a quantised weight that is there is used again, and gradients are added. True would overwrite what others added before.
            return module(x, is_first_microbatch=False)


class Layers:
    """TE's linear layers by module and recipe.

    One for each recipe: TE 2.20.2 rebuilds a layer's quantizers when the class of its recipe changes, but not when an option does.
    """

    def __init__(self, te: Any) -> None:
        self._te = te
        self._layers: dict[tuple[str, str], Layer] = {}

    def find(self, name: str, x: Tensor, weight: Tensor, formats: Formats) -> Layer | None:
        """The layer of a module; None where TE's own cannot do just what the formats say to these shapes and dtypes."""
        if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or any(size % ALIGNED for size in (len(x), *weight.shape)):
            return None
        if not expressible(formats, name):
            return None
        wanted = arguments(formats, name)
        key = (name, repr(wanted))
        if key not in self._layers or self._layers[key]._weight is not weight:
            self._layers[key] = Layer(self._te, weight, recipe(formats, name))
        return self._layers[key]
