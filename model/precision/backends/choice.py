"""Which backends there are, and which one runs."""

from collections.abc import Iterable

import torch

from model.precision.backend import Asked, Backend
from model.precision.backends.cpu import FusedCPU
from model.precision.backends.reference import Reference
from model.precision.backends.transformer_engine import TransformerEngine
from model.precision.backends.triton import Triton

CLASSES: dict[str, type[Backend]] = {cls.name: cls for cls in (Reference, FusedCPU, Triton, TransformerEngine)}
NAMES = ("auto", *CLASSES)


def _resolved(name: str, device: torch.device) -> str:
    """What "auto" means on a device. Never transformer_engine: its random bits cannot be drawn again, so a resume would be another run."""
    if name == "auto":
        return "triton" if device.type == "cuda" else "cpu"
    return name


def missing(name: str, device: torch.device) -> str | None:
    """What keeps a backend from running on this device, as the end of a sentence; None when nothing does."""
    name = _resolved(name, device)
    if name not in CLASSES:
        return f"it does not exist: use one of {', '.join(NAMES)}"
    return CLASSES[name].missing(device)


def check(name: str, device: torch.device, formats: Iterable[Asked], *, compute: str, amax_scope: str) -> None:
    """Raises ValueError, in one sentence, where the backend `precision.backend` asks for cannot run on a device, or not these formats."""
    if (lacking := missing(name, device)) is not None:
        raise ValueError(f"precision.backend={_resolved(name, device)} cannot run: {lacking}")
    CLASSES[_resolved(name, device)].check(formats, compute=compute, amax_scope=amax_scope)


def choose(name: str, device: torch.device) -> Backend:
    """The backend `precision.backend` asks for on a device; "auto": cpu or triton. Raises ValueError saying what it lacks."""
    check(name, device, (), compute="fp32", amax_scope="local")
    return CLASSES[_resolved(name, device)]()
