"""Whether the sizes of a model divide over its layout: the general ones, and what its mixers declare."""

from model.mixer import MIXERS
from train.recipe.tree import Recipe


def validate_layout(recipe: Recipe) -> None:
    """Raises ValueError, in one sentence, for a layout that the model's sizes do not divide over."""
    model, parallel, train = recipe.model, recipe.parallel, recipe.train
    tensor, expert = parallel.tensor, parallel.expert
    _divides("model.vocab_size", model.vocab_size, "parallel.tensor", tensor)
    for mixer in model.used:
        sizes = model.sizes(mixer.sizes)
        for key in mixer.tensor_divides:
            _divides(f"model.{key}", getattr(sizes, key), "parallel.tensor", tensor)
        for key in mixer.expert_divides:
            _divides(f"model.{key}", getattr(sizes, key), "parallel.expert", expert)
        for key in mixer.expert_tensor_divides:
            _divides(f"model.{key}", getattr(sizes, key), "parallel.expert_tensor", parallel.expert_tensor)
    if parallel.sequence_parallel and train.sequence_length % tensor:
        raise ValueError(
            f"train.sequence_length={train.sequence_length} is not a multiple of parallel.tensor={tensor}, which splits sequences: change "
            "one of them, or set parallel.sequence=false"
        )
    for mixer in model.used:
        mixer.check_layout(model.sizes(mixer.sizes), parallel)
    for name in ("expert", "expert_tensor"):
        if getattr(parallel, name) > 1 and not model.has_experts:
            able = [mixer for mixer in MIXERS.values() if mixer.expert_divides]
            raise ValueError(
                f"parallel.{name}={getattr(parallel, name)} needs {' or '.join(mixer.name for mixer in able)} layers, but model.pattern="
                f"{model.pattern!r} has no {' or '.join(mixer.letter for mixer in able)}: use 1"
            )
    if parallel.pipeline > len(model.layers):
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} exceeds the {len(model.layers)} layers of model.pattern: use at most that many stages"
        )


def _divides(key: str, value: int, by: str, ranks: int) -> None:
    if value % ranks:
        raise ValueError(f"{key}={value} is not a multiple of {by}={ranks}: change one of them")
