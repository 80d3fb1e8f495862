"""Hugging Face's NemotronH: the same names on disk but for a prefix, and a config.json that says the same sizes.

Weights of the main model load into `transformers`' NemotronHForCausalLM without remote code. It knows no multi-token prediction in its forward
pass and ignores `mtp.*`, where our MTP blocks are kept under their own names: one block when shared, one per depth otherwise.
"""

from typing import Any

from model.config import ModelConfig
from model.mixer import MIXERS, HuggingFace, Mixer
from train.recipe.reading import read

# transformers clamps dt from below, Megatron and we do not: a bound no softplus reaches in fp32 switches the clamp off.
NO_CLAMP = 1e-30
TRANSFORMERS_CLAMP = 1e-3  # where config.json says nothing
PREFIX = "backbone."


def to_hugging_face(name: str) -> str:
    """Our name of a tensor -> its name in a Hugging Face checkpoint."""
    return name if name.startswith(("lm_head.", "mtp.")) else PREFIX + name


def from_hugging_face(name: str) -> str:
    """The inverse of `to_hugging_face`."""
    return name.removeprefix(PREFIX)


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
        "layers_block_type": [types[letter] for letter in model.layers],
        "tie_word_embeddings": False,
        "max_position_embeddings": sequence_length,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "time_step_min": NO_CLAMP,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": end_of_document,
        "num_nextn_predict_layers": model.mtp_depths,
    }
    if model.mtp_depths:
        config["mtp_layers_block_type"] = [types[letter] for letter in model.parsed.mtp[0]]
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


def model_config(config: dict[str, Any], mtp_blocks: int) -> ModelConfig:
    """The `model` group a config.json describes. mtp_blocks: how many MTP blocks the checkpoint holds.

    Raises ValueError, naming the key, for models this one is not.
    """
    if config.get("model_type") != "nemotron_h":
        raise ValueError(f"config.json has model_type={config.get('model_type')!r}: only nemotron_h can be imported")
    wanted = {"tie_word_embeddings": False}
    for _, theirs in _known():
        wanted |= theirs.constants
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json has {key}={config[key]!r}, which this model does not have: only {key}={value!r} can be imported")
    layers = config.get("layers_block_type") or config.get("layer_types")
    if not layers:
        raise ValueError("config.json has no layers_block_type: it cannot be told which layer is what")
    letters = {name: mixer.letter for mixer, theirs in _known() for name in (theirs.layer_type, *theirs.aliases)}
    pattern = "".join(letters[kind] for kind in layers)
    depths = int(config.get("num_nextn_predict_layers") or 0) if mtp_blocks else 0
    pattern += "".join("/" + "".join(letters[kind] for kind in config["mtp_layers_block_type"]) for _ in range(depths))
    values = {
        "pattern": pattern,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "init_std": config.get("initializer_range", 0.02),
        "mtp_shared": mtp_blocks <= 1,
    }
    for mixer, theirs in _known():
        if mixer.letter in pattern:
            values |= {ours: config[key] for key, ours in theirs.keys.items() if key in config}
    model = read(ModelConfig, values, "model")
    model.validate()
    return model
