"""config.json of Hugging Face's NemotronH, as the published Nemotron 3 checkpoints have it and its readers want it.

Layers are said twice, as letters (vLLM, Megatron-Bridge) and as names (transformers, SGLang); the names are the older ones, which all know.
"""

from typing import Any

from model.config import ModelConfig
from model.mixer import MIXERS, HuggingFace, Mixer
from train.recipe.reading import read

# transformers clamps dt from below, Megatron and we do not: a bound no softplus reaches in fp32 switches the clamp off.
NO_CLAMP = 1e-30
TRANSFORMERS_CLAMP = 1e-3  # where config.json says nothing
# How many depths were trained, in Megatron's word: the published keys have no place for it where they share a block. Read by us alone.
DEPTHS = "mtp_num_layers"


def _known() -> list[tuple[Mixer[Any], HuggingFace]]:
    """The mixers NemotronH has, and what it calls them."""
    return [(mixer, mixer.hugging_face) for mixer in MIXERS.values() if mixer.hugging_face is not None]


def check_exportable(model: ModelConfig) -> None:
    """Raises ValueError, in one sentence, for a model that config.json cannot describe."""
    for mixer in model.used:
        if mixer.hugging_face is None:
            letters = ", ".join(f"{known.letter} ({known.name})" for known, _ in _known())
            raise ValueError(
                f"model.pattern={model.pattern!r} has {mixer.letter!r} ({mixer.name}) layers, which Hugging Face's NemotronH does not know: "
                f"only models of {letters} can be exported"
            )
    if model.tied_embeddings:
        raise ValueError(
            "model.tied_embeddings=true is not written, as servers read a head of its own: only models without it can be exported"
        )
    if len(set(model.parsed.mtp)) > 1:
        raise ValueError(
            f"model.pattern={model.pattern!r} has MTP depths that differ, which config.json cannot say: export a model whose depths are alike"
        )


def hugging_face_config(model: ModelConfig, *, dtype: str, sequence_length: int, end_of_document: int | None) -> dict[str, Any]:
    """config.json. dtype: of the weights, "float32" or "bfloat16". Raises ValueError where there is none."""
    check_exportable(model)
    types = {mixer.letter: theirs.layer_type for mixer, theirs in _known()}
    config: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": len(model.layers),
        "hybrid_override_pattern": model.layers,
        "layers_block_type": [types[letter] for letter in model.layers],
        "tie_word_embeddings": False,
        "max_position_embeddings": sequence_length,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "time_step_min": NO_CLAMP,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": end_of_document,
        "num_nextn_predict_layers": model.mtp_blocks,
    }
    if model.mtp_depths:
        config |= {
            "mtp_hybrid_override_pattern": model.parsed.mtp[0],
            "mtp_layers_block_type": [types[letter] for letter in model.parsed.mtp[0]],
            "mtp_use_repeated_layer": model.mtp_shared,
            "mtp_loss_scaling_factor": model.mtp_loss_scale,
            DEPTHS: model.mtp_depths,
        }
    for mixer, theirs in _known():
        config |= theirs.constants
        sizes = model.sizes(mixer.sizes)
        for key, ours in theirs.keys.items():
            value = getattr(sizes, ours)
            if value is not None or ours not in sizes.needed():
                config[key] = value
    return config


def clamp(config: dict[str, Any]) -> float | None:
    """Where transformers clamps dt from below in a model of this config.json, and this model does not; None where it does not either."""
    least = float(config.get("time_step_min", TRANSFORMERS_CLAMP))
    return least if least > NO_CLAMP else None


def _letters(config: dict[str, Any], pattern_key: str, *list_keys: str) -> str:
    """The layers by either spelling, "" where there is neither. Raises ValueError for two that differ, and KeyError for a layer we do not know."""
    letters = {name: mixer.letter for mixer, theirs in _known() for name in (theirs.layer_type, *theirs.aliases)}
    found = {key: "".join(letters[kind] for kind in config[key]) for key in list_keys if config.get(key)}
    if config.get(pattern_key):
        found[pattern_key] = str(config[pattern_key])
    if len(set(found.values())) > 1:
        raise ValueError("config.json says two things of the layers: " + ", ".join(f"{key} says {said!r}" for key, said in found.items()))
    return next(iter(found.values()), "")


def mtp_letters(config: dict[str, Any]) -> str:
    """The layers of one MTP depth. Raises as `model_config`."""
    letters = _letters(config, "mtp_hybrid_override_pattern", "mtp_layers_block_type", "mtp_layer_types")
    if config.get("num_nextn_predict_layers") and not letters:
        raise ValueError("config.json has num_nextn_predict_layers, but neither mtp_layers_block_type nor mtp_hybrid_override_pattern")
    return letters


def model_config(config: dict[str, Any], mtp_layers: int) -> ModelConfig:
    """The `model` group a config.json describes. mtp_layers: how many the checkpoint holds, all MTP depths together; transformers keeps none.

    Raises ValueError, naming the key, for models this one is not; KeyError for a key that is missing or a layer we do not know.
    """
    if config.get("model_type") != "nemotron_h":
        raise ValueError(f"config.json has model_type={config.get('model_type')!r}: only nemotron_h can be imported")
    wanted = {"tie_word_embeddings": False}
    for _, theirs in _known():
        wanted |= theirs.constants
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json has {key}={config[key]!r}, which this model does not have: only {key}={value!r} can be imported")
    pattern = _letters(config, "hybrid_override_pattern", "layers_block_type", "layer_types")
    if not pattern:
        raise ValueError("config.json has neither layers_block_type nor hybrid_override_pattern: it cannot be told which layer is what")
    depth = mtp_letters(config)
    blocks = int(config.get("num_nextn_predict_layers") or 0) if mtp_layers else 0
    if mtp_layers != blocks * len(depth):
        raise ValueError(
            f"config.json has num_nextn_predict_layers={blocks} depths of {depth!r}, but {mtp_layers} layers under mtp.layers: copy it again"
        )
    shared = bool(config.get("mtp_use_repeated_layer", True)) and blocks <= 1
    depths = int(config.get(DEPTHS) or blocks) if shared and blocks else blocks
    values = {
        "pattern": pattern + f"/{depth}" * depths,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "init_std": config.get("initializer_range", 0.02),
        "mtp_shared": shared,
    }
    if depths and "mtp_loss_scaling_factor" in config:
        values["mtp_loss_scale"] = config["mtp_loss_scaling_factor"]
    for mixer, theirs in _known():
        if mixer.letter in values["pattern"]:
            values |= _sizes(config, theirs)
    model = read(ModelConfig, values, "model")
    model.validate()
    return model


def _sizes(config: dict[str, Any], theirs: HuggingFace) -> dict[str, Any]:
    """A mixer's keys of a recipe. Raises ValueError where two keys of config.json say different things of one."""
    said: dict[str, str] = {}
    for key, ours in theirs.keys.items():
        if key in config and config[key] != config[said.setdefault(ours, key)]:
            raise ValueError(
                f"config.json has {said[ours]}={config[said[ours]]!r} and {key}={config[key]!r}, which are the same: make them equal"
            )
    return {ours: config[key] for ours, key in said.items()}
