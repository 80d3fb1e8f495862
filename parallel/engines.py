"""The engines a recipe can name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallel.deepspeed import limits
from parallel.engine import Engine, ModelSizes, Optimizer
from parallel.layout import Layout, ParallelConfig
from parallel.megatron.engine import MegatronEngine
from parallel.stage import Stage

OpenEngine = Callable[[Sequence[Stage], Layout, ModelSizes, Optimizer], Engine]
CheckEngine = Callable[[ParallelConfig, str], None]


@dataclass(frozen=True)
class EngineKind:
    """See `register_engine`."""

    open: OpenEngine
    check: CheckEngine


_engines: dict[str, EngineKind] = {}


def register_engine(name: str, open_engine: OpenEngine, check: CheckEngine) -> None:
    """Makes `parallel.engine=name` mean `open_engine(model chunks, layout, model sizes, optimizer)`.

    check: (layout, activation dtype as `precision.compute` names it) -> raises ValueError, in one sentence, for what the engine cannot do.
    """
    if name in _engines:
        raise ValueError(f"there is an engine {name!r} already: choose another name")
    _engines[name] = EngineKind(open_engine, check)


def check_engine(config: ParallelConfig, compute: str) -> None:
    """Raises ValueError, in one sentence, for an engine there is not, and for what the chosen one cannot do with this layout and activation dtype
    (`precision.compute`)."""
    if config.engine not in _engines:
        raise ValueError(f"parallel.engine={config.engine!r} is not available: use parallel.engine={' or '.join(_engines)}")
    _engines[config.engine].check(config, compute)


def open_engine(name: str, chunks: Sequence[Stage], layout: Layout, sizes: ModelSizes, optimizer: Optimizer) -> Engine:
    """The engine `name`, which `check_engine` has let pass, around the model chunks of this rank."""
    return _engines[name].open(chunks, layout, sizes, optimizer)


def _check_megatron(config: ParallelConfig, compute: str) -> None:
    for key, unset in (("zero_stage", None), ("offload_optimizer", False)):
        if (value := getattr(config, key)) != unset:
            raise ValueError(
                f"parallel.{key}={str(value).lower()} has no meaning with parallel.engine=megatron: use parallel.engine=deepspeed, or leave it unset"
            )


def _open_deepspeed(chunks: Sequence[Stage], layout: Layout, sizes: ModelSizes, optimizer: Optimizer) -> Engine:
    from parallel.deepspeed.engine import DeepSpeedEngine  # an optional package, which takes seconds to import

    return DeepSpeedEngine(chunks, layout, sizes, optimizer)


register_engine("megatron", MegatronEngine, _check_megatron)
register_engine("deepspeed", _open_deepspeed, limits.check)
