"""What a server makes of an exported directory, after the rules of vLLM's loaders (`nemotron_h.py`, `nemotron_h_mtp.py`, `mamba_mixer2.py`, MoE
weights of `fused_moe`), from config.json and the names and shapes of tensors alone."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
Config = Mapping[str, Any]

STACKED = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
EXPERTS = {"up_proj": ("w13_weight", "w1"), "down_proj": ("w2_weight", "w2")}


def mamba(config: Config) -> dict[str, dict[Any, Shape]]:
    heads, inner = config["mamba_num_heads"], config["mamba_num_heads"] * config["mamba_head_dim"]
    convolved = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    return {
        "in_proj.weight": {None: (inner + convolved + heads, config["hidden_size"])},
        "conv1d.weight": {None: (convolved, 1, config["conv_kernel"])},
        "conv1d.bias": {None: (convolved,)},
        "A": {None: (heads,)},
        "D": {None: (heads,)},
        "dt_bias": {None: (heads,)},
        "norm.weight": {None: (inner,)},
        "out_proj.weight": {None: (config["hidden_size"], inner)},
    }


def attention(config: Config) -> dict[str, dict[Any, Shape]]:
    hidden, size = config["hidden_size"], config["head_dim"]
    rows = {"q": config["num_attention_heads"] * size, "k": config["num_key_value_heads"] * size, "v": config["num_key_value_heads"] * size}
    return {
        "qkv_proj.weight": {shard: (count, hidden) for shard, count in rows.items()},
        "o_proj.weight": {None: (hidden, config["num_attention_heads"] * size)},
    }


def mlp(config: Config, size: int | None = None, name: str = "") -> dict[str, dict[Any, Shape]]:
    hidden, ffn = config["hidden_size"], size or config["intermediate_size"]
    return {f"{name}up_proj.weight": {None: (ffn, hidden)}, f"{name}down_proj.weight": {None: (hidden, ffn)}}


def moe(config: Config) -> dict[str, dict[Any, Shape]]:
    hidden, experts, ffn = config["hidden_size"], config["n_routed_experts"], config["moe_intermediate_size"]
    latent = config.get("moe_latent_size")
    width = latent or hidden
    params: dict[str, dict[Any, Shape]] = {
        "gate.weight": {None: (experts, hidden)},
        "gate.e_score_correction_bias": {None: (experts,)},
        "experts.w13_weight": {("w1", expert): (ffn, width) for expert in range(experts)},
        "experts.w2_weight": {("w2", expert): (width, ffn) for expert in range(experts)},
    }
    if latent is not None:
        params |= {"fc1_latent_proj.weight": {None: (latent, hidden)}, "fc2_latent_proj.weight": {None: (hidden, latent)}}
    return params | mlp(config, config["moe_shared_expert_intermediate_size"] * config["n_shared_experts"], "shared_experts.")


MIXERS: dict[str, Callable[[Config], dict[str, dict[Any, Shape]]]] = {"M": mamba, "*": attention, "-": mlp, "E": moe}


@dataclass
class Server:
    """params: by name, the parts that must be loaded into each. complaints: what a tensor that was given is wrong about."""

    params: dict[str, dict[Any, Shape]] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def layer(self, prefix: str, letter: str, config: Config) -> None:
        self.params[f"{prefix}.norm.weight"] = {None: (config["hidden_size"],)}
        self.params |= {f"{prefix}.mixer.{name}": parts for name, parts in MIXERS[letter](config).items()}

    def take(self, name: str, shape: Shape) -> None:
        """A tensor of the checkpoint, by the name the server's mapper has given it."""
        key = name
        part: Any = None
        if (expert := re.fullmatch(r"(.+\.experts\.)(\d+)\.(up_proj|down_proj)\.weight", name)) is not None:
            stacked, shard = EXPERTS[expert[3]]
            key, part = expert[1] + stacked, (shard, int(expert[2]))
        elif (projection := re.fullmatch(r"(.+\.mixer\.)([qkv]_proj)(\.weight)", name)) is not None:
            key, part = f"{projection[1]}qkv_proj{projection[3]}", STACKED[projection[2]]
        wanted = self.params.get(key, {})
        if part not in wanted:
            self.complaints.append(f"{name} has no place")
        elif (expected := wanted.pop(part)) != tuple(shape):
            self.complaints.append(f"{name} is {tuple(shape)} and not {expected}")

    def problems(self) -> list[str]:
        return self.complaints + [f"{name} lacks {part}" for name, parts in self.params.items() for part in parts]


def target(config: Config, tensors: Mapping[str, Shape]) -> list[str]:
    """`NemotronHForCausalLM`: what it complains of, [] for nothing. Leaves the MTP layers to the draft model."""
    server = Server()
    server.params |= {
        name: {None: (config["vocab_size"], config["hidden_size"])} for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    server.params["model.norm_f.weight"] = {None: (config["hidden_size"],)}
    for index, letter in enumerate(config["hybrid_override_pattern"]):
        server.layer(f"model.layers.{index}", letter, config)
    for name, shape in tensors.items():
        if not name.startswith("mtp"):
            renamed = re.sub("^backbone", "model", name).replace("A_log", "A").replace("embeddings", "embed_tokens")
            server.take(renamed, shape)
    return server.problems()


def draft(config: Config, tensors: Mapping[str, Shape]) -> list[str]:
    """`NemotronHMTP`: the same, of the MTP layers and what they share with the main model."""
    hidden, pattern = config["hidden_size"], config["mtp_hybrid_override_pattern"]
    if config["num_nextn_predict_layers"] != 1:
        return ["Only one MTP layer is supported for NemotronH-MTP"]
    server = Server()
    server.params |= {name: {None: (config["vocab_size"], hidden)} for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for index, letter in enumerate(pattern):
        if letter not in "*E":
            return [f"Pattern char {letter!r} in {pattern} not implemented"]
        server.layer(f"model.layers.{index}", letter, config)
        if index == 0:
            server.params |= {f"model.layers.0.{norm}.weight": {None: (hidden,)} for norm in ("enorm", "hnorm")}
            server.params["model.layers.0.eh_proj.weight"] = {None: (hidden, 2 * hidden)}
        if index == len(pattern) - 1:
            server.params[f"model.layers.{index}.final_layernorm.weight"] = {None: (hidden,)}
    for name, shape in tensors.items():
        if name.startswith("mtp.") or "embeddings" in name or name.startswith("lm_head."):
            renamed = name.replace("mtp.layers.", "model.layers.").replace("embeddings", "embed_tokens").replace("backbone.", "model.")
            server.take(renamed, shape)
    return server.problems()
