"""Where in a run an error arose, for the sentence above its traceback."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from train.observe.redact import redacted


@dataclass
class Place:
    """What the loop is doing now. step: being taken, counted from 1."""

    doing: str = "the start"
    step: int = 0
    samples: tuple[int, ...] = ()
    """global indices of the step's samples of this rank; empty outside a step"""


def sentence(error: BaseException, place: Place, rank: int, world_size: int, chunks: Iterable[nn.Module]) -> str:
    """`error: step 12, on rank 1, samples 96 to 103, in layers.3.mixer: ValueError: message`."""
    parts = [place.doing if place.step == 0 else f"{place.doing} {place.step}"]
    if world_size > 1:
        parts.append(f"on rank {rank}")
    if place.samples:
        parts.append(f"samples {min(place.samples)} to {max(place.samples)}")
    module = module_of(error, chunks)
    if module is not None:
        parts.append(f"in {module}")
    text = (redacted(str(error)).strip() or "no reason given").splitlines()[0]
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"error: {', '.join(parts)}: {type(error).__name__}: {text}{notes}"


def module_of(error: BaseException, chunks: Iterable[nn.Module]) -> str | None:
    """The innermost module of the model whose method the error passed through, by name and class; None when it passed through none (a
    backward pass runs without them). Costs nothing until there is an error: the traceback's frames know their `self`."""
    names = {id(module): name for chunk in chunks for name, module in chunk.named_modules() if name}
    found, frames = None, error.__traceback__
    while frames is not None:
        owner = frames.tb_frame.f_locals.get("self")
        if id(owner) in names:
            found = f"{names[id(owner)]} ({type(owner).__name__})"
        frames = frames.tb_next
    return found
