"""Whether the sizes of a model divide over its layout."""

from train.recipe.tree import Recipe


def validate_layout(recipe: Recipe) -> None:
    model, parallel, train = recipe.model, recipe.parallel, recipe.train
    letters = set(model.pattern) - {"/"}
    tensor = parallel.tensor
    divided: list[tuple[str, int | None]] = [("model.vocab_size", model.vocab_size)]
    if "*" in letters:
        divided += [("model.attention_heads", model.attention_heads), ("model.key_value_heads", model.key_value_heads)]
    if "M" in letters:
        divided += [("model.mamba_heads", model.mamba_heads), ("model.mamba_groups", model.mamba_groups)]
    if "-" in letters:
        divided.append(("model.ffn_hidden_size", model.ffn_hidden_size))
    if "E" in letters:
        divided.append(("model.shared_expert_ffn_size", model.shared_expert_ffn_size))
    for key, value in divided:
        assert value is not None  # model.validate has seen to it
        if value % tensor:
            raise ValueError(f"{key}={value} is not a multiple of parallel.tensor={tensor}: change one of them")
    if parallel.sequence_parallel and train.sequence_length % tensor:
        raise ValueError(
            f"train.sequence_length={train.sequence_length} is not a multiple of parallel.tensor={tensor}, which splits sequences: change "
            "one of them, or set parallel.sequence=false"
        )
    if "E" in letters:
        assert model.experts is not None
        if model.experts % parallel.expert:
            raise ValueError(f"model.experts={model.experts} is not a multiple of parallel.expert={parallel.expert}: change one of them")
        if tensor > 1 and not parallel.sequence_parallel:
            raise ValueError(
                "parallel.sequence=false with parallel.tensor > 1 cannot run MoE layers (E in model.pattern): set parallel.sequence=true"
            )
    elif parallel.expert > 1:
        raise ValueError(f"parallel.expert={parallel.expert} needs MoE layers, but model.pattern={model.pattern!r} has no E: use 1")
    if parallel.pipeline > len(model.layers):
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} exceeds the {len(model.layers)} layers of model.pattern: use at most that many stages"
        )
