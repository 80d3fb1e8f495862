"""Writes a checkpoint as others read it: config.json, safetensors, tokenizer and generation_config.json.

    python -m train.export checkpoint=runs/tiny to=exported dtype=bf16
    python -m train.export checkpoint=runs/tiny to=exported format=nvfp4

The main model loads into transformers' NemotronHForCausalLM without remote code, and with its MTP block into vLLM, SGLang and Megatron-Bridge: see
`train.huggingface.names` and `train.huggingface.readers`. No more than one shard is in memory at a time.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from train.checkpoint.reader import Checkpoint
from train.huggingface.config import check_exportable, hugging_face_config
from train.huggingface.names import differences, dtype_on_disk, layers_of_a_depth, shapes, shapes_on_disk, to_hugging_face
from train.huggingface.nvfp4 import LAYOUTS, linear_names, quantization_config, rounded_weights
from train.huggingface.readers import check_readers
from train.huggingface.tokenizer import generation_config, write_tokenizer
from train.recipe.reading import read
from train.run_directory import run_dir_of, stored_recipe

SHARD_BYTES = 4 << 30
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
MODEL = "model/"


class Written(Protocol):
    """Tensors of the checkpoint as they are written, in one file. names: of those they come from; tensors: by our names."""

    @property
    def names(self) -> list[str]: ...
    @property
    def nbytes(self) -> int: ...
    def tensors(self, checkpoint: Checkpoint) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Kept:
    """A tensor that is written as it is, but for its dtype. name: ours."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def names(self) -> list[str]:
        return [self.name]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        return {self.name: checkpoint.read_full(MODEL + self.name).to(self.dtype).contiguous()}


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    return read(ModelConfig, stored_recipe(checkpoint)["model"], "model")


def export(
    checkpoint: Checkpoint,
    to: Path,
    *,
    format: str | None = None,
    dtype: str | None = None,
    readers: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes everything to the directory `to`, which must not hold another model; returns the files.

    format: one of LAYOUTS, which `train.huggingface.nvfp4` writes; None: the weights themselves. dtype: bf16 or fp32, of what is not NVFP4;
    None: as the weights are stored, and bf16 beside NVFP4. readers: refuse what these cannot use, before anything is written. Raises ValueError,
    in one sentence.
    """
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"to={str(to)!r} is not empty: choose a new directory")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is unknown: use {' or '.join(DTYPES)}, or leave it out for that of the checkpoint")
    if format is not None and format not in LAYOUTS:
        raise ValueError(f"format={format} is unknown: use {' or '.join(LAYOUTS)}, or leave it out for the weights themselves")
    values, model = stored_recipe(checkpoint), model_of(checkpoint)
    check_exportable(model)
    check_readers(readers, model, format)
    stored = {name: checkpoint.stored(MODEL + name) for name in checkpoint.names("model")}
    if found := differences({name: tensor.shape for name, tensor in stored.items()}, shapes(model)):
        raise ValueError(f"checkpoint={checkpoint.path} {found}: export one that this version of the recipe's model has written")
    own = torch.bfloat16 if format or stored["embeddings.weight"].dtype == torch.bfloat16 else torch.float32
    written = own if dtype is None else DTYPES[dtype]
    rounded = rounded_weights(checkpoint, written, format) if format else []
    covered = {name for each in rounded for name in each.names}
    kept = [Kept(name, tensor.shape, dtype_on_disk(name, written)) for name, tensor in stored.items() if name not in covered]
    everything: list[Written] = sorted([*kept, *rounded], key=lambda each: each.names[0])

    to.mkdir(parents=True, exist_ok=True)
    depth = layers_of_a_depth(model)
    shards = list(_shards(everything, shard_bytes))
    made = (
        {to_hugging_face(name, depth): tensor for each in shard for name, tensor in each.tensors(checkpoint).items()} for shard in shards
    )
    files = _write_shards(to, made, len(shards))
    tokenizer = run_dir_of(checkpoint) / "tokenizer"
    files += write_tokenizer(tokenizer, to)
    generation = generation_config(tokenizer, model.vocab_size)
    files.append(_write(to / "generation_config.json", generation))
    config = hugging_face_config(
        model,
        dtype=NAMES[written],
        sequence_length=values.get("train", {}).get("sequence_length", 8192),
        end_of_document=generation.get("eos_token_id"),
    )
    if format:
        packed = [to_hugging_face(name, depth) for each in rounded if each.packed for name in each.names]
        config["quantization_config"] = quantization_config(format, packed, linear_names(shapes_on_disk(model)))
    files.append(_write(to / "config.json", config))
    return files


def _write_shards(to: Path, shards: Iterable[dict[str, Tensor]], count: int) -> list[Path]:
    """One file, or several with an index; `shards` are made as they are written. Returns the files."""
    weight_map: dict[str, str] = {}
    files: list[Path] = []
    total = 0
    for number, tensors in enumerate(shards, start=1):
        path = to / ("model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors")
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # the library's own lets nobody but the owner read it
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        files.append(path)
        tensors.clear()  # before the next are made
    if count > 1:
        files.append(_write(to / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}))
    return files


def _shards(everything: Iterable[Written], limit: int) -> Iterator[list[Written]]:
    shard: list[Written] = []
    size = 0
    for each in everything:
        if shard and size + each.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(each)
        size += each.nbytes
    yield shard


def _write(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(json.dumps(value, indent=2) + "\n")
    return path
