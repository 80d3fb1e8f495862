"""Which number formats there are. A new one is a class that inherits from `formats.base.Format`, and one call of `register_format`."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from model.precision.formats.base import Format, FormatOptions
from model.precision.formats.bf16 import BF16
from model.precision.formats.fp32 import FP32
from model.precision.formats.mxfp8 import MXFP8
from model.precision.formats.nvfp4 import NVFP4

FORMATS: dict[str, type[Format]] = {}


def register_format(name: str, cls: type[Format]) -> None:
    """Makes a format known to recipes as `name`, which is its `name`, with its options as `precision.<name>.*`.

    Before a recipe is read. Raises ValueError when the name is taken or is not the class's own.
    """
    if FORMATS.get(name, cls) is not cls:
        raise ValueError(f"the number format {name!r} is registered already: choose another name")
    if cls.name != name:
        raise ValueError(f"the number format {cls.__name__} calls itself {cls.name!r}, not {name!r}: register it under its name")
    FORMATS[name] = cls


for _cls in (FP32, BF16, MXFP8, NVFP4):
    register_format(_cls.name, _cls)


def format_class(name: str) -> type[Format]:
    """Raises ValueError, as the end of a sentence, for a name that is not registered."""
    if name not in FORMATS:
        raise ValueError(f"is unknown: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def option_kinds() -> Mapping[str, type[Any]]:
    """The dataclass of options of every format that has some, by name."""
    return {name: cls.Options for name, cls in FORMATS.items() if fields(cls.Options)}


def usual_options() -> dict[str, FormatOptions]:
    """The defaults of all those."""
    return {name: kind() for name, kind in option_kinds().items()}
