"""Which module runs which GEMM in which format, and when: one pure function of a recipe's `precision` group.

Rules are read top to bottom and the *last* one that matches decides, as in a stylesheet: the default first, exceptions after it.
A `schedule` is a list of rules with a `start`: it is read after the rules, so it overrides them while it lasts.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from model.precision.backend import BACKENDS
from model.precision.formats import FORMATS, GEMMS, Format, FormatName, Gemm, NVFP4Options

LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """`format` for the modules a glob matches, in some GEMMs, during a part of the run.

    modules: globs over canonical module names (`layers.*.mixer.out_proj`, `mtp.*`), empty: every module. last_layers: only the last
    ceil(fraction * layers) layers of the main stack (MTP is not counted and not matched). start, end: fractions of the run,
    start <= progress < end; or texts that `PrecisionConfig.timed` turns into fractions. optional: the rule may match no module of a model
    (a ready-made group serves many models).
    """

    format: FormatName
    modules: tuple[str, ...] = ()
    gemms: tuple[Gemm, ...] = GEMMS
    last_layers: float | None = None
    start: float | str = 0.0
    end: float | str = 1.0
    optional: bool = False

    def covers(self, module: str, layers: int) -> bool:
        """Whether the module, at some time, may be meant."""
        if self.modules and not any(fnmatchcase(module, glob) for glob in self.modules):
            return False
        if self.last_layers is None:
            return True
        match = LAYER.match(module)
        return match is not None and int(match[1]) >= layers - math.ceil(self.last_layers * layers - 1e-9)


def moment(value: float | str) -> float:
    """A start or end that is a fraction of the run. Raises ValueError for a text, which only a recipe can read."""
    if isinstance(value, str):
        raise ValueError(f"{value!r} is a moment of a recipe: use Recipe.policy, which knows how long the run is")
    return value


@dataclass(frozen=True)
class PrecisionConfig:
    """The recipe's `precision` group. compute: dtype of activations and of the weights in memory, fp32 or bf16; auto: bf16 on a GPU, fp32 on
    a CPU, decided when the recipe is read. backend: of NVFP4; auto: by device."""

    compute: str = "auto"
    default: FormatName = "nvfp4"
    rules: tuple[Rule, ...] = ()
    schedule: tuple[Rule, ...] = ()
    nvfp4: NVFP4Options = field(default_factory=NVFP4Options)
    amax_scope: str = "local"
    backend: str = "auto"

    def timed(self, fraction: Callable[[str, str], float]) -> "PrecisionConfig":
        """The same with every start and end a fraction of the run; fraction(key, text) gives the one a text stands for."""

        def of(group: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
            timed = []
            for index, rule in enumerate(rules):
                times: dict[str, Any] = {
                    name: fraction(f"precision.{group}[{index}].{name}", value)
                    for name, value in (("start", rule.start), ("end", rule.end))
                    if isinstance(value, str)
                }
                timed.append(replace(rule, **times))
            return tuple(timed)

        return replace(self, rules=of("rules", self.rules), schedule=of("schedule", self.schedule))

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for values that cannot be honoured."""
        if self.compute not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision.compute={self.compute!r} is unknown: use auto, fp32 or bf16")
        if self.default not in FORMATS:
            raise ValueError(f"precision.default={self.default!r} is unknown: use one of {', '.join(FORMATS)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"precision.backend={self.backend!r} is unknown: use one of {', '.join(BACKENDS)}")
        if self.amax_scope not in ("local", "tensor_parallel"):
            raise ValueError(f"precision.amax_scope={self.amax_scope!r} is unknown: use local or tensor_parallel")
        options = self.nvfp4
        for key, value, known in (
            ("weight_scaling", options.weight_scaling, ("1d", "2d")),
            ("clipping", options.clipping, ("saturate", "4over6_mae", "4over6_mse")),
            ("e4m3_bound", options.e4m3_bound, (448, 256)),
        ):
            if value not in known:
                raise ValueError(f"precision.nvfp4.{key}={value!r} is unknown: use {' or '.join(map(str, known))}")
        if options.e4m3_bound != 448 and options.clipping == "saturate":
            raise ValueError(
                f"precision.nvfp4.e4m3_bound={options.e4m3_bound} is for 4over6_mae and 4over6_mse, but precision.nvfp4.clipping is saturate: "
                "use 448, or another clipping"
            )
        for group, rules in (("rules", self.rules), ("schedule", self.schedule)):
            for index, rule in enumerate(rules):
                key = f"precision.{group}[{index}]"
                if rule.format not in FORMATS:
                    raise ValueError(f"{key}.format={rule.format!r} is unknown: use one of {', '.join(FORMATS)}")
                unknown = [gemm for gemm in rule.gemms if gemm not in GEMMS]
                if unknown or not rule.gemms:
                    raise ValueError(f"{key}.gemms={list(rule.gemms)} is unknown: list some of {', '.join(GEMMS)}")
                if rule.last_layers is not None and not 0 < rule.last_layers <= 1:
                    raise ValueError(f"{key}.last_layers={rule.last_layers} must be a fraction of the layers: use for instance 0.15")
                if not 0 <= moment(rule.start) < moment(rule.end) <= 1:
                    raise ValueError(
                        f"{key}: start={rule.start} and end={rule.end} must satisfy 0 <= start < end <= 1: "
                        "they are fractions of the run (write 200steps for a step)"
                    )


class Policy:
    """The resolved precision of a model of `layers` layers (MTP not counted)."""

    def __init__(self, config: PrecisionConfig, layers: int):
        config.validate()
        self.config = config
        self.layers = layers
        self._lookup = lru_cache(maxsize=None)(self._resolve)
        self._boundaries = sorted({edge for rule in self._all() for edge in (moment(rule.start), moment(rule.end))})

    @property
    def times(self) -> list[float]:
        """The starts of the intervals of the run in which formats stay the same."""
        return sorted({0.0, *(edge for edge in self._boundaries if edge < 1.0)})

    def _all(self) -> Sequence[Rule]:
        return (*self.config.rules, *self.config.schedule)

    def format_for(self, module: str, gemm: Gemm, progress: float = 0.0) -> Format:
        """The format of one GEMM of one module when `progress` (in [0, 1]) of the run is behind us."""
        # Only the interval between two boundaries matters, so a step costs one dictionary lookup.
        interval = sum(edge <= progress for edge in self._boundaries)
        return self._lookup(module, gemm, interval)

    def _resolve(self, module: str, gemm: Gemm, interval: int) -> Format:
        time = self._boundaries[interval - 1] if interval else 0.0
        name = self.config.default
        for rule in self._all():
            # The last moment of the run belongs to the last interval.
            during = moment(rule.start) <= time < moment(rule.end) or (time >= 1.0 and rule.end == 1.0)
            if during and gemm in rule.gemms and rule.covers(module, self.layers):
                name = rule.format
        return Format(name, self.config.nvfp4)

    def formats(self, module: str, progress: float = 0.0) -> tuple[Format, Format, Format]:
        """Formats of fprop, dgrad and wgrad."""
        fprop, dgrad, wgrad = (self.format_for(module, gemm, progress) for gemm in GEMMS)
        return fprop, dgrad, wgrad

    def check(self, modules: Iterable[str]) -> None:
        """Raises ValueError when a rule names a module that does not exist: it would be ignored without a word."""
        names = list(modules)
        for group, rules in (("rules", self.config.rules), ("schedule", self.config.schedule)):
            for index, rule in enumerate(rules):
                for glob in () if rule.optional else rule.modules:
                    if not any(fnmatchcase(name, glob) for name in names):
                        raise ValueError(
                            f"precision.{group}[{index}].modules={glob!r} matches no module of this model: "
                            f"correct it or delete the rule; modules are named like {names[0]}"
                        )


def shares(flops: Mapping[str, float], policy: Policy, progress: float) -> dict[str, float]:
    """Share of the GEMM FLOPs in each format. flops: forward FLOPs per token of every linear module (each GEMM costs as much)."""
    total: dict[str, float] = {}
    for module, value in flops.items():
        for form in policy.formats(module, progress):
            total[form.name] = total.get(form.name, 0.0) + value
    whole = sum(total.values())
    return {name: value / whole for name, value in total.items()}
