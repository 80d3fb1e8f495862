"""The engines a recipe can name."""

from collections.abc import Callable, Sequence

from parallel.engine import Engine, ModelSizes, Optimizer
from parallel.layout import Layout
from parallel.megatron.engine import MegatronEngine
from parallel.stage import Stage

OpenEngine = Callable[[Sequence[Stage], Layout, ModelSizes, Optimizer], Engine]

_engines: dict[str, OpenEngine] = {}


def register_engine(name: str, open_engine: OpenEngine) -> None:
    """Makes `parallel.engine=name` mean `open_engine(model chunks, layout, model sizes, optimizer)`."""
    if name in _engines:
        raise ValueError(f"there is an engine {name!r} already: choose another name")
    _engines[name] = open_engine


def check_engine(name: str) -> None:
    """Raises ValueError, in one sentence, for an engine there is not."""
    if name not in _engines:
        raise ValueError(f"parallel.engine={name!r} is not available: use parallel.engine={' or '.join(_engines)}")


def open_engine(name: str, chunks: Sequence[Stage], layout: Layout, sizes: ModelSizes, optimizer: Optimizer) -> Engine:
    """The engine `name` around the model chunks of this rank."""
    check_engine(name)
    return _engines[name](chunks, layout, sizes, optimizer)


register_engine("megatron", MegatronEngine)
