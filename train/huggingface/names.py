"""Names of tensors: ours, and those on disk, which are those of the published Nemotron 3 checkpoints.

    embeddings.weight, layers.*, norm_f.weight     backbone.<the same>
    lm_head.weight                                 the same
    mtp.layers.D.{embedding_norm,hidden_norm}      mtp.layers.N.{enorm,hnorm}          N = D * L, the first layer of depth D
    mtp.layers.D.eh_proj                           mtp.layers.N.eh_proj
    mtp.layers.D.layers.I.*                        mtp.layers.N.*                      N = D * L + I
    mtp.layers.D.final_norm                        mtp.layers.N.final_layernorm        N = D * L + L - 1, the last layer of depth D

L is the number of layers of a depth; depths that share a block are one, D = 0. Sources: vLLM's `nemotron_h.py` and `nemotron_h_mtp.py`, SGLang's
files of these names, Megatron-Bridge's `nemotron_h_bridge.py`.
"""

import re
from collections.abc import Mapping

import torch

from model.config import ModelConfig
from model.count import on_meta
from parallel.shards import pieces_of

PREFIX = "backbone."
FIRST = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "eh_proj": "eh_proj"}  # modules of a depth, on disk in its first layer
LAST = {"final_norm": "final_layernorm"}  # and in its last one
_OURS = {theirs: ours for ours, theirs in (FIRST | LAST).items()}


def layers_of_a_depth(model: ModelConfig) -> int:
    return len(model.parsed.mtp[0]) if model.parsed.mtp else 0


def to_hugging_face(name: str, depth_layers: int) -> str:
    """Our name of a tensor -> its name on disk. depth_layers: of each MTP depth."""
    found = re.fullmatch(r"mtp\.layers\.(\d+)\.(?:layers\.(\d+)\.(.+)|(\w+)\.(.+))", name)
    if found is None:
        return name if name.startswith("lm_head.") else PREFIX + name
    depth, inner, rest, module, leaf = found.groups()
    first = int(depth) * depth_layers
    if inner is not None:
        return f"mtp.layers.{first + int(inner)}.{rest}"
    if module in FIRST:
        return f"mtp.layers.{first}.{FIRST[module]}.{leaf}"
    return f"mtp.layers.{first + depth_layers - 1}.{LAST[module]}.{leaf}"


def from_hugging_face(name: str, depth_layers: int) -> str:
    """The inverse of `to_hugging_face`."""
    found = re.fullmatch(r"mtp\.layers\.(\d+)\.(\w+)\.(.+)", name)
    if found is None or not depth_layers:
        return name.removeprefix(PREFIX)
    number, module, leaf = found.groups()
    depth, inner = divmod(int(number), depth_layers)
    if module in _OURS:
        return f"mtp.layers.{depth}.{_OURS[module]}.{leaf}"
    return f"mtp.layers.{depth}.layers.{inner}.{module}.{leaf}"


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name of every tensor of a model -> its shape; nothing is allocated."""
    held = on_meta(model).state_dict(keep_vars=True).values()
    return {piece.name: piece.shape for tensor in held for piece in pieces_of(tensor)}


def shapes_on_disk(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The same by their names on disk."""
    return {to_hugging_face(name, layers_of_a_depth(model)): shape for name, shape in shapes(model).items()}


def dtype_on_disk(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of a tensor, in a checkpoint of `dtype`: the biases by which routers choose experts are fp32 always."""
    return torch.float32 if name.endswith(".e_score_correction_bias") else dtype


def differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is missing, too much or of another shape, as the middle of a sentence; None where nothing is."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"has no tensor {name}"
        if name not in expected:
            return f"has a tensor {name}, which the model has not"
        if found[name] != expected[name]:
            return f"has {name} of shape {list(found[name])} instead of {list(expected[name])}"
    return None
