"""Writes a checkpoint for Hugging Face: config.json, safetensors and the tokenizer.

    python -m train.export checkpoint=runs/tiny to=exported

The main model loads into transformers' NemotronHForCausalLM without remote code; MTP blocks are kept under `mtp.*`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model.config import ModelConfig
from train.checkpoint.reader import Checkpoint
from train.huggingface.config import check_exportable, hugging_face_config, to_hugging_face
from train.recipe.reading import read
from train.run_directory import run_dir_of, stored_recipe

SHARD_BYTES = 4 << 30
MODEL = "model/"


def export(checkpoint: Checkpoint, to: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes everything to the directory `to`, which must not hold another model; returns the files."""
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"to={str(to)!r} is not empty: choose a new directory")
    values = stored_recipe(checkpoint)
    model = read(ModelConfig, values["model"], "model")
    check_exportable(model)
    to.mkdir(parents=True, exist_ok=True)
    names = sorted(name for name in checkpoint.manifest.tensors if name.startswith(MODEL))
    shards = _shards(checkpoint, names, shard_bytes)
    weight_map: dict[str, str] = {}
    files: list[Path] = []
    dtypes: set[torch.dtype] = set()
    total = 0
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        path = to / ("model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        tensors = {to_hugging_face(name.removeprefix(MODEL)): checkpoint.read_full(name).contiguous() for name in shard}
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        dtypes |= {tensor.dtype for name, tensor in tensors.items() if not name.endswith("e_score_correction_bias")}
        files.append(path)
    if len(shards) > 1:
        files.append(_write(to / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}))
    tokenizer = run_dir_of(checkpoint) / "tokenizer"
    end_of_document = None
    for name in sorted(source.name for source in tokenizer.glob("*")) if tokenizer.is_dir() else ():
        (to / name).write_bytes((tokenizer / name).read_bytes())
        files.append(to / name)
    facts = tokenizer / "facts.json"
    if facts.exists():
        end_of_document = json.loads(facts.read_text())["end_of_document"]
    config = hugging_face_config(
        model,
        dtype="bfloat16" if dtypes == {torch.bfloat16} else "float32",
        sequence_length=values.get("train", {}).get("sequence_length", 8192),
        end_of_document=end_of_document,
    )
    files.append(_write(to / "config.json", config))
    return files


def _shards(checkpoint: Checkpoint, names: Iterable[str], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        stored = checkpoint.stored(name)
        bytes_ = torch.Size(stored.shape).numel() * 4
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def _write(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(json.dumps(value, indent=2) + "\n")
    return path
