"""What a number format is: how each operand of each GEMM is prepared, what of x is kept for the backward pass, how products are scaled.

    fprop   y  = x W^T        `fprop` prepares x and W
    dgrad   dx = dy W         `dgrad` prepares dy and W
    wgrad   dW = dy^T x       `keep` says in the forward pass what of x outlives it, `wgrad` prepares dy and what was kept

The three GEMMs of a module may run in three formats; each method belongs to the format of its GEMM (`keep` and `wgrad` to wgrad's). A format
that is another one with a difference inherits from it and says the difference. Whatever is random comes from `Call.stream` or `Call.key`, so
that a resume and another layout draw the same.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from model.precision import gemm as gemms
from model.precision.gemm import Gemm
from model.precision.operand import Operand, Rows, gemm_dtype
from model.precision.site import Call, Site


@dataclass(frozen=True)
class FormatOptions:
    """Options of a format, as the recipe's `precision.<format>.*` gives them; frozen, so that formats can be compared. This one: none."""

    def validate(self, key: str) -> None:
        """Raises ValueError, in one sentence, for values that contradict each other. key: of the group, as `precision.nvfp4`."""


class Unfit(ValueError):
    """A module that cannot run in a format. what: cannot be, with values; remedy: what a person can do, in the recipe's `precision` group; operand:
    whose size on one rank is wrong, if one's is."""

    def __init__(self, what: str, remedy: str, operand: Literal["tokens", "weight"] | None = None) -> None:
        super().__init__(f"{what}: {remedy}")
        self.what, self.remedy, self.operand = what, remedy, operand


@dataclass(frozen=True)
class Use:
    """A linear module that is to run some GEMMs in a format, for `Format.check`."""

    module: str
    """Canonical name."""
    gemms: tuple[Gemm, ...]
    rows: int
    """Output features of the weight on one rank, of one expert."""
    columns: int
    """Input features likewise."""
    tokens: int
    """Of a microbatch on one rank; of routed experts, of all of them."""
    routed: bool = False
    """Routed experts: groups of any number of tokens."""
    router: bool = False
    """Chooses experts, by small differences."""


class Format(ABC):
    """A number format with its options. Formats are equal when name and options are."""

    name: ClassVar[str]
    """As recipes, tables and metrics call it."""
    Options: ClassVar[type[FormatOptions]] = FormatOptions
    quantises: ClassVar[bool] = True
    """Whether operands lose more than bf16 does: their health is measured, and routers are refused."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and (self.name, self.options) == (other.name, other.options)

    def __hash__(self) -> int:
        return hash((self.name, self.options))

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.label(self.Options())

    def label(self, usual: Any) -> str:
        """The name and, in parentheses, which options differ from the usual ones."""
        given = [(field.name, getattr(self.options, field.name)) for field in fields(self.options)]
        shown = [f"{name}={str(value).lower()}" for name, value in given if value != getattr(usual, name)]
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    # -- operands --------------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def fprop(self, x: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        """x [rows, K] and weight [groups, N, K] as fprop multiplies them."""

    @abstractmethod
    def keep(self, x: Tensor, multiplied: Operand, call: Call) -> Operand:
        """What `wgrad` will need of x [rows, K]; the less the better, for it lives until the backward pass. multiplied: x as fprop multiplied
        it (in whatever format: `call.formats[0]`)."""

    @abstractmethod
    def dgrad(self, dy: Tensor, weight: Tensor, call: Call) -> tuple[Operand, Operand]:
        """dy [rows, N] and weight [groups, N, K] as dgrad multiplies them: the weight by its rows, not transposed."""

    @abstractmethod
    def wgrad(self, dy: Tensor, kept: Operand, multiplied: Operand | None, call: Call) -> tuple[Operand, Operand]:
        """dy [rows, N] and x as wgrad multiplies them, by their rows (tokens). multiplied: dy as dgrad multiplied it (`call.formats[1]`);
        None where there was no dgrad."""

    # -- products --------------------------------------------------------------------------------------------------------------------------

    def multiply(self, gemm: Gemm, left: Operand, right: Operand, into: Tensor, call: Call) -> None:
        """The product of what the methods above gave, scaled; see `model.precision.gemm` for shapes."""
        gemms.multiply(gemm, left, right, into, call.backend, self.multiplied_in(into.device), singly=call.singly)

    def multiplied_in(self, device: torch.device) -> torch.dtype:
        """The dtype in which values are multiplied; it must hold them exactly."""
        return gemm_dtype(device)

    # -- what it needs and what it does besides --------------------------------------------------------------------------------------------

    def draws(self, gemm: Gemm) -> bool:
        """Whether its operands of this GEMM need random bits for each token, so that tokens must carry their identities to the experts."""
        return False

    def check(self, use: Use) -> None:
        """Raises Unfit for a module it cannot run in."""
        if use.router and self.quantises:
            raise Unfit(
                f"precision asks for {self} in the router {use.module}, but routers run in fp32 or bf16 only",
                "add a rule with modules=['*.gate'] and format=fp32",
            )

    changes_weights: ClassVar[bool] = False
    """Whether `after_step` is to be asked at all."""

    def after_step(self, weight: Tensor, site: Site, step: int) -> None:
        """Changes a weight [groups, N, K] of a module that runs fprop in this format, in place, after optimizer step `step` (from 0). The same on
        every rank that holds this part of the weight. weight: the optimizer's fp32 master, which the weight itself then follows."""
        return None


Formats = tuple[Format, Format, Format]  # of fprop, dgrad, wgrad


def weight_rows(weight: Tensor) -> Rows:
    """Groups of the rows of `flat(weight)`."""
    return Rows((weight.shape[1],) * weight.shape[0])


def flat(weight: Tensor) -> Tensor:
    """weight [groups, N, K] as [groups * N, K]."""
    return weight.detach().flatten(0, 1)
