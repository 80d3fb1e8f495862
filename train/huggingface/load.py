"""Reads a Hugging Face NemotronH checkpoint into a run directory that training can start from.

    python -m train.import_hf checkpoint=exported to=runs/imported
    python -m train -cn tiny checkpoint.initialize_from=runs/imported ...        # with the sizes printed

Either spelling of the layers is read. Weights, MTP blocks included, are taken over bit for bit, NVFP4 ones as their
values in fp32; there is no optimizer state in such a checkpoint.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint.boxes import Box
from train.checkpoint.checkpointer import CHECKPOINTS
from train.checkpoint.parts import Part
from train.checkpoint.writer import save
from train.huggingface.config import model_config, mtp_letters
from train.huggingface.names import differences, from_hugging_face, shapes
from train.huggingface.nvfp4 import layout_of, unpacked
from train.recipe.reading import plain


def _files(source: Path) -> list[Path]:
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"checkpoint={str(source)!r} holds no .safetensors file: give a directory written by save_pretrained or train.export"
        )
    return files


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): copy it again") from None


def _parts(tensors: Iterable[tuple[str, Tensor]], depth_layers: int) -> Iterator[Part]:
    for name, tensor in tensors:
        shape = tuple(tensor.shape)
        yield Part(f"model/{from_hugging_face(name, depth_layers)}", shape, Box(tuple(0 for _ in shape), shape), tensor)


def import_hf(source: Path, to: Path) -> Path:
    """Writes `to`/checkpoints/step-00000000, recipe.yaml (model and precision) and tokenizer/; returns the checkpoint's path."""
    if (to / CHECKPOINTS).exists():
        raise ValueError(f"to={str(to)!r} holds checkpoints already: choose a new directory")
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a directory written by save_pretrained or train.export")
    try:
        config = json.loads(path.read_text())
        depth_layers = len(mtp_letters(config))
        tensors, layout = _tensors(_files(source)), layout_of(config)
        parts = list(_parts(tensors if layout is None else unpacked(tensors, layout), depth_layers))
        model = model_config(config, _mtp_layers(parts, depth_layers))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from None
    except KeyError as error:
        raise ValueError(
            f"{path} lacks or does not know {error}: only NemotronH models as transformers writes them can be imported"
        ) from None
    if found := differences({part.name.removeprefix("model/"): part.shape for part in parts}, shapes(model)):
        raise ValueError(f"checkpoint={str(source)!r} {found}: copy it again, with the config.json that belongs to it")
    written = save(to / CHECKPOINTS, 0, parts, {"imported_from": str(source)})
    bf16 = any(part.tensor.dtype == torch.bfloat16 for part in parts)
    compute = "bf16" if bf16 else "fp32"
    recipe = {"model": plain(model), "precision": {"compute": compute, "default": compute}}
    (to / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    tokenizer = to / "tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json", "facts.json"):
        if (source / name).is_file():
            tokenizer.mkdir(exist_ok=True)
            (tokenizer / name).write_bytes((source / name).read_bytes())
    return written


def _mtp_layers(parts: Sequence[Part], depth_layers: int) -> int:
    """Layers of all MTP depths a checkpoint holds."""
    return depth_layers * len({part.name.split(".")[2] for part in parts if part.name.startswith("model/mtp.layers.")})
