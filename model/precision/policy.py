"""Which module runs which GEMM in which format, and when: one pure function of a recipe's `precision` group.

A rule may change options of its format (`precision.rules[1].nvfp4.clipping`); what it does not change is as the group has it.
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

from model.precision.backends.choice import NAMES
from model.precision.formats.base import Format, FormatOptions, Formats
from model.precision.formats.registry import format_class, option_kinds, usual_options
from model.precision.gemm import GEMMS, Gemm

LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """`format` for the modules a glob matches, in some GEMMs, during a part of the run."""

    format: str
    """Number format: fp32, bf16, mxfp8, nvfp4, or what is registered."""
    modules: tuple[str, ...] = ()
    """Globs over canonical module names (`layers.*.mixer.out_proj`, `mtp.*`); empty: every module."""
    gemms: tuple[Gemm, ...] = GEMMS
    """In which of the three GEMMs."""
    last_layers: float | None = None
    """Only the last ceil(fraction * layers) layers of the main stack (MTP is not counted and not matched)."""
    start: float | str = 0.0
    """From when on: a fraction of the run, a duration (2000steps, 20T tokens) or decay."""
    end: float | str = 1.0
    """Until when: start <= progress < end."""
    optional: bool = False
    """The rule may match no module of a model (a ready-made group serves many models)."""
    options: dict[str, Mapping[str, Any]] = field(default_factory=dict, metadata={"kinds": option_kinds, "flat": False, "partial": True})
    """Options of the format that differ from those of the group, by format."""

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
    """The recipe's `precision` group."""

    compute: str = "auto"
    """Dtype of activations and of the weights in memory: fp32 or bf16; auto: bf16 on a GPU, fp32 on a CPU, decided when the recipe is read."""
    default: str = "nvfp4"
    """Number format of what no rule matches: fp32, bf16, mxfp8, nvfp4, or what is registered."""
    rules: tuple[Rule, ...] = ()
    """Exceptions; the last one that matches decides."""
    schedule: tuple[Rule, ...] = ()
    """Rules with a start, read after the others."""
    options: dict[str, FormatOptions] = field(
        default_factory=usual_options, metadata={"kinds": option_kinds, "flat": False, "partial": False}
    )
    """Options of every format, which a rule may override."""
    amax_scope: str = "local"
    """Over what amaxes are taken: local, what a rank holds; tensor_parallel, whole tensors, so that values are those of one rank."""
    backend: str = "auto"
    """What computes NVFP4; auto: cpu on a CPU, triton on a GPU."""

    def form(self, name: str, changed: Mapping[str, Any] | None = None) -> Format:
        """A format with the options of this group, some of them changed. Raises ValueError, as the end of a sentence, for an unknown name."""
        cls = format_class(name)
        usual = self.options.get(name) or cls.Options()
        return cls(replace(usual, **(changed or {})))

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
        if self.backend not in NAMES:
            raise ValueError(f"precision.backend={self.backend!r} is unknown: use one of {', '.join(NAMES)}")
        if self.amax_scope not in ("local", "tensor_parallel"):
            raise ValueError(f"precision.amax_scope={self.amax_scope!r} is unknown: use local or tensor_parallel")
        for name, options in self.options.items():
            options.validate(f"precision.{name}")
        _known("precision.default", self.default, self)
        for group, rules in (("rules", self.rules), ("schedule", self.schedule)):
            for index, rule in enumerate(rules):
                key = f"precision.{group}[{index}]"
                if (other := next((name for name in rule.options if name != rule.format), None)) is not None:
                    raise ValueError(f"{key}.{other} gives options of {other}, but {key}.format is {rule.format}: change one of them")
                form = _known(f"{key}.format", rule.format, self, rule.options.get(rule.format))
                form.options.validate(f"{key}.{rule.format}" if rule.options else f"precision.{rule.format}")
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


def _known(key: str, name: str, config: PrecisionConfig, changed: Mapping[str, Any] | None = None) -> Format:
    try:
        return config.form(name, changed)
    except ValueError as error:
        raise ValueError(f"{key}={name!r} {error}") from None


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
        form = self.config.form(self.config.default)
        for rule in self._all():
            # The last moment of the run belongs to the last interval.
            during = moment(rule.start) <= time < moment(rule.end) or (time >= 1.0 and rule.end == 1.0)
            if during and gemm in rule.gemms and rule.covers(module, self.layers):
                form = self.config.form(rule.format, rule.options.get(rule.format))
        return form

    def formats(self, module: str, progress: float = 0.0) -> Formats:
        """Formats of fprop, dgrad and wgrad."""
        fprop, dgrad, wgrad = (self.format_for(module, gemm, progress) for gemm in GEMMS)
        return fprop, dgrad, wgrad

    def ever(self, modules: Iterable[str]) -> list[Format]:
        """Every format that some GEMM of these modules runs in at some time of the run, in the order in which they appear."""
        return list(dict.fromkeys(form for module in modules for time in self.times for form in self.formats(module, time)))

    @property
    def changes_weights(self) -> bool:
        """Whether some format of this run changes weights after a step."""
        names = {self.config.default, *(rule.format for rule in self._all())}
        return any(format_class(name).changes_weights for name in names)

    def label(self, form: Format) -> str:
        """A format's name, with those of its options that a rule has changed."""
        return form.label(self.config.form(form.name).options)

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
