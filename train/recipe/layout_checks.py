"""Whether the sizes of a model divide over its layout: the general ones, and what its mixers declare."""

from model.mixer import MIXERS
from model.stages import pipeline_parts
from train.recipe.tree import Recipe


def validate_layout(recipe: Recipe) -> None:
    """Raises ValueError, in one sentence, for a layout that the model's sizes do not divide over."""
    model, parallel = recipe.model, recipe.parallel
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
    _sequence_divides(recipe)
    for mixer in model.used:
        mixer.check_layout(model.sizes(mixer.sizes), parallel)
    for name in ("expert", "expert_tensor"):
        if getattr(parallel, name) > 1 and not model.has_experts:
            able = [mixer for mixer in MIXERS.values() if mixer.expert_divides]
            raise ValueError(
                f"parallel.{name}={getattr(parallel, name)} needs {' or '.join(mixer.name for mixer in able)} layers, but model.pattern="
                f"{model.pattern!r} has no {' or '.join(mixer.letter for mixer in able)}: use 1"
            )
    pipeline_parts(model, parallel, recipe.train.sequence_length)


def _sequence_divides(recipe: Recipe) -> None:
    """Every rank of the context group holds as many tokens, and with sequence parallelism so does every one of the tensor group."""
    length, parallel, model = recipe.train.sequence_length, recipe.parallel, recipe.model
    by = [f"parallel.context={parallel.context}"] * (parallel.context > 1)
    by += [f"parallel.tensor={parallel.tensor}"] * parallel.sequence_parallel
    parts = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    if length % parts:
        fitting = sorted({max(1, length // parts) * parts, -(-length // parts) * parts})
        splits = ", which splits sequences" if len(by) == 1 else f" = {parts}, which split sequences"
        raise ValueError(
            f"train.sequence_length={length} is not a multiple of {' x '.join(by)}{splits}: use train.sequence_length="
            f"{' or '.join(map(str, fitting))}, or change the layout"
        )
    if parallel.context == 1:
        return
    for mixer in model.used:
        if mixer.context_tokens is None:
            raise ValueError(f"parallel.context={parallel.context} cannot split sequences for {mixer.name} layers: use parallel.context=1")
        if length // parallel.context < (least := mixer.context_tokens(model.sizes(mixer.sizes))):
            most = next(n for n in range(max(1, length // least), 0, -1) if n == 1 or length % (n * parts // parallel.context) == 0)
            raise ValueError(
                f"parallel.context={parallel.context} leaves a rank {length // parallel.context} of train.sequence_length={length} tokens, but "
                f"{mixer.name} layers need {least}: use parallel.context={most} or less"
            )


def _divides(key: str, value: int, by: str, ranks: int) -> None:
    if value % ranks:
        raise ValueError(f"{key}={value} is not a multiple of {by}={ranks}: change one of them")
