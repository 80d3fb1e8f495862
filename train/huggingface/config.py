"""Hugging Face's NemotronH: the same names on disk but for a prefix, and a config.json that says the same sizes.

Weights of the main model load into `transformers`' NemotronHForCausalLM without remote code. It knows no multi-token prediction in its forward
pass and ignores `mtp.*`, where our MTP blocks are kept under their own names: one block when shared, one per depth otherwise.
"""

from typing import Any

from model.config import ModelConfig

LAYER_TYPES = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
LETTERS = {name: letter for letter, name in LAYER_TYPES.items()} | {"mamba": "M", "attention": "*"}
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


def hugging_face_config(model: ModelConfig, *, dtype: str, sequence_length: int, end_of_document: int | None) -> dict[str, Any]:
    """config.json. dtype: of the weights, "float32" or "bfloat16"."""
    config: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "layers_block_type": [LAYER_TYPES[letter] for letter in model.layers],
        "tie_word_embeddings": False,
        "max_position_embeddings": sequence_length,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "time_step_min": NO_CLAMP,
        "conv_kernel": model.mamba_conv_width,
        "chunk_size": model.mamba_chunk_size,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "n_shared_experts": 1,
        "moe_latent_size": model.latent_size,
        "routed_scaling_factor": model.routed_scaling_factor,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": end_of_document,
        "num_nextn_predict_layers": model.mtp_depths,
    }
    if model.mtp_depths:
        if len(set(model.parsed.mtp)) > 1:
            raise ValueError(
                f"model.pattern={model.pattern!r} has MTP depths that differ, which config.json cannot say: export a model whose depths are alike"
            )
        config["mtp_layers_block_type"] = [LAYER_TYPES[letter] for letter in model.parsed.mtp[0]]
    for theirs, ours in SIZES.items():
        if (value := getattr(model, ours)) is not None:
            config[theirs] = value
    return config


SIZES = {
    "num_attention_heads": "attention_heads",
    "num_key_value_heads": "key_value_heads",
    "head_dim": "head_dim",
    "mamba_num_heads": "mamba_heads",
    "mamba_head_dim": "mamba_head_dim",
    "ssm_state_size": "mamba_state_size",
    "n_groups": "mamba_groups",
    "intermediate_size": "ffn_hidden_size",
    "n_routed_experts": "experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "expert_ffn_size",
    "moe_shared_expert_intermediate_size": "shared_expert_ffn_size",
}


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
    for key, wanted in (
        ("tie_word_embeddings", False),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("use_bias", False),
        ("use_conv_bias", True),
        ("n_group", 1),
        ("topk_group", 1),
        ("norm_topk_prob", True),
        ("n_shared_experts", 1),
        ("mlp_hidden_act", "relu2"),
    ):
        if config.get(key, wanted) != wanted:
            raise ValueError(
                f"config.json has {key}={config[key]!r}, which this model does not have: only {key}={wanted!r} can be imported"
            )
    layers = config.get("layers_block_type") or config.get("layer_types")
    if not layers:
        raise ValueError("config.json has no layers_block_type: it cannot be told which layer is what")
    pattern = "".join(LETTERS[kind] for kind in layers)
    depths = int(config.get("num_nextn_predict_layers") or 0) if mtp_blocks else 0
    pattern += "".join("/" + "".join(LETTERS[kind] for kind in config["mtp_layers_block_type"]) for _ in range(depths))
    letters = set(pattern)
    keep = {
        "*": ("attention_heads", "key_value_heads", "head_dim"),
        "M": ("mamba_heads", "mamba_head_dim", "mamba_state_size", "mamba_groups"),
        "-": ("ffn_hidden_size",),
        "E": ("experts", "top_k", "expert_ffn_size", "shared_expert_ffn_size"),
    }
    wanted_sizes = {name for letter in letters & keep.keys() for name in keep[letter]}
    sizes = {ours: config[theirs] for theirs, ours in SIZES.items() if ours in wanted_sizes and theirs in config}
    model = ModelConfig(
        pattern=pattern,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        mamba_conv_width=config.get("conv_kernel", 4),
        mamba_chunk_size=config.get("chunk_size", 128),
        latent_size=config.get("moe_latent_size") if "E" in letters else None,
        routed_scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        init_std=config.get("initializer_range", 0.02),
        mtp_shared=mtp_blocks <= 1,
        **sizes,
    )
    model.validate()
    return model
