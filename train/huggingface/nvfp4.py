"""NVFP4 weights for others, weights only, in two layouts: compressed-tensors' (`nvfp4-pack-quantized`) and ModelOpt's (`W4A16_NVFP4`).

A linear layer's `weight` [N, K] becomes

    compressed-tensors     ModelOpt
    weight_packed          weight                uint8 [N, K / 2]      two E2M1 codes a byte, the even column in the low nibble
    weight_scale           weight_scale          E4M3  [N, K / 16]     of 16 consecutive elements of a row; of 16 x 16 where training scaled so,
                                                                       repeated for every row
    weight_global_scale    weight_scale_2        fp32  [1], []         value = code * (weight_scale / weight_global_scale), or
                                                                       code * (weight_scale * weight_scale_2)

with the codes and scales that the forward GEMM of training multiplied. What the policy gives another format stays `weight`: MXFP8 as the values
it multiplied, which bf16 holds exactly. config.json names those layers under `quantization_config.ignore`.

ModelOpt's number is the reciprocal, rounded to fp32, so its values are training's but for the last bits of fp32. Sources: compressed-tensors 0.20.0,
`compressors/nvfp4`; nvidia-modelopt 0.47.0, `quantization/qtensor/nvfp4_tensor.py` and `export/convert_hf_config.py`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.count import on_meta
from model.linear import Linear
from model.moe import Experts
from model.precision.backends.choice import choose
from model.precision.formats.base import Format, Formats
from model.precision.formats.mxfp8 import MXFP8
from model.precision.formats.nvfp4 import NVFP4
from model.precision.multiplied import Blocks, as_multiplied, blocks_of
from model.precision.nvfp4 import BLOCK
from model.precision.site import Site
from parallel.shards import Piece, pieces_of
from train.checkpoint.boxes import Box
from train.checkpoint.parts import Part
from train.checkpoint.reader import Checkpoint
from train.generation.speaker import on_one_rank
from train.recipe.load import read_recipe
from train.run_directory import stored_recipe

WEIGHTS = {"num_bits": 4, "type": "float", "group_size": BLOCK, "dynamic": False}


@dataclass(frozen=True)
class Layout:
    """How NVFP4 lies on disk. method: what config.json calls it; packed, scale, whole: the last parts of the tensors' names; config: what else
    config.json says."""

    method: str
    packed: str
    scale: str
    whole: str
    config: Mapping[str, Any]

    @property
    def reciprocal(self) -> bool:
        """Whether the scale of the whole weight is multiplied with."""
        return self.method == "modelopt"

    def written(self, global_scale: Tensor) -> Tensor:
        return global_scale.reciprocal().squeeze() if self.reciprocal else global_scale.clone()

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """fp32 [N, K], as the layout's own package computes them, before it rounds them."""
        codes, scales, whole = parts[self.packed], parts[self.scale], parts[self.whole]
        if self.reciprocal:
            return Blocks(codes, scales.float() * whole, torch.ones(1)).values()
        return Blocks(codes, scales, whole).values()

    def holds(self, kind: str, tensor: Tensor) -> bool:
        """Whether a tensor whose name ends so is a part of a packed weight."""
        return kind in (self.scale, self.whole) or (kind == self.packed and tensor.dtype == torch.uint8)


LAYOUTS = {
    "nvfp4": Layout(
        "compressed-tensors",
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        {
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**WEIGHTS, "strategy": "tensor_group", "symmetric": True},
                    "input_activations": None,
                    "output_activations": None,
                    "format": "nvfp4-pack-quantized",
                }
            },
            "kv_cache_scheme": None,
        },
    ),
    "nvfp4_modelopt": Layout(
        "modelopt",
        "weight",
        "weight_scale",
        "weight_scale_2",
        {
            "quant_algo": "W4A16_NVFP4",
            "group_size": BLOCK,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        },
    ),
}
"""By `format` of an export."""


@dataclass(frozen=True)
class Rounded:
    """A weight that training multiplied in fewer bits than it is stored in: of one linear layer, or of one expert. pieces: where it lies in the
    checkpoint's tensors."""

    pieces: tuple[Piece, ...]
    rows: int
    columns: int
    site: Site
    formats: Formats
    dtype: torch.dtype
    """Of what is written where that is not packed."""
    layout: Layout

    @property
    def names(self) -> list[str]:
        """Of the tensors it is made of: ours."""
        return list(dict.fromkeys(piece.name for piece in self.pieces))

    @property
    def packed(self) -> bool:
        return type(self.formats[0]) is NVFP4

    @property
    def nbytes(self) -> int:
        if not self.packed:
            return self.rows * self.columns * self.dtype.itemsize
        return self.rows * self.columns // 2 + self.rows * self.columns // BLOCK + 4 * len(self.names)

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """What is written, by our names."""
        weight = torch.empty(self.rows, self.columns, dtype=checkpoint.stored(f"model/{self.pieces[0].name}").dtype)
        checkpoint.load_into(
            Part(f"model/{p.name}", p.shape, Box(p.offset, tuple(weight[p.local].shape)), weight[p.local]) for p in self.pieces
        )
        if not self.packed:
            return self._whole({"": as_multiplied(weight, self.formats, self.site, checkpoint.step).to(self.dtype)})
        blocks = blocks_of(weight, self.formats, self.site, checkpoint.step)
        assert blocks is not None
        tensors = self._whole({self.layout.packed: blocks.codes, self.layout.scale: blocks.scales})
        whole = self.layout.whole
        return tensors | {f"{name.removesuffix('weight')}{whole}": self.layout.written(blocks.global_scale) for name in self.names}

    def _whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Matrices with the weight's rows, cut into those of the tensors on disk."""
        tensors: dict[str, Tensor] = {}
        for kind, part in parts.items():
            for piece in self.pieces:
                name = piece.name.removesuffix("weight") + kind if kind else piece.name
                if name not in tensors:
                    tensors[name] = torch.empty(piece.shape[0], part.shape[1], dtype=part.dtype)
                rows = part[piece.local[0]]
                tensors[name][piece.offset[0] : piece.offset[0] + len(rows)] = rows
        return tensors


def rounded_weights(checkpoint: Checkpoint, dtype: torch.dtype, format: str) -> list[Rounded]:
    """The weights whose forward GEMM rounds them at the step of a checkpoint. dtype: of what is not packed; format: one of LAYOUTS.

    Raises ValueError where none is NVFP4, or one cannot be written.
    """
    stored = stored_recipe(checkpoint)
    recipe = read_recipe(on_one_rank(stored, stored.get("precision", {})), 1)
    progress = min(checkpoint.step / recipe.total_steps, 1.0)
    backend = choose("cpu", torch.device("cpu"))
    found: list[Rounded] = []
    for module in on_meta(recipe.model).modules():
        for site, weight in module.weights() if isinstance(module, Linear | Experts) else ():
            formats = recipe.policy.formats(site.name, progress)
            if formats[0].quantises:
                rows, columns = weight.shape[-2:]
                _check(site.name, columns, formats[0], format)
                for pieces in _groups(weight):
                    found.append(Rounded(pieces, rows, columns, replace(site, backend=backend), formats, dtype, LAYOUTS[format]))
    if not any(each.packed for each in found):
        raise ValueError(
            f"format={format} is for weights trained in NVFP4: no module of {checkpoint.path} multiplies NVFP4 weights at this step"
        )
    return found


def _groups(weight: Tensor) -> Iterator[tuple[Piece, ...]]:
    """The pieces of a weight [N, K], or those of each expert of [E, N, K], as of a matrix."""
    pieces = pieces_of(weight)
    if weight.dim() == 2:
        yield pieces
        return
    for piece in pieces:
        yield (replace(piece, local=piece.local[1:]),)


def _check(name: str, columns: int, form: Format, format: str) -> None:
    if type(form) not in (NVFP4, MXFP8):  # what inherits from them may prepare weights in ways that no reader undoes
        raise ValueError(f"format={format} writes weights trained in nvfp4 and mxfp8, and {name} is {form}: export without format={format}")
    if type(form) is NVFP4 and columns % BLOCK:
        raise ValueError(
            f"format={format} has blocks of {BLOCK}, which do not divide the {columns} columns of {name}: give it another format"
        )


def quantization_config(format: str, packed: Iterable[str], linear: Iterable[str]) -> dict[str, Any]:
    """config.json's entry. format: one of LAYOUTS; packed: names on disk of the weights in NVFP4; linear: of those of all linear layers."""
    layout = LAYOUTS[format]
    written = set(packed)
    ignored = sorted(name.removesuffix(".weight") for name in set(linear) - written)
    # vLLM asks for a gate projection's scheme also of experts that have none, and wants it to be that of the others.
    gates = sorted(name.replace(".0.up_proj", ".0.gate_proj") for name in ignored if name.endswith(".experts.0.up_proj"))
    return {"quant_method": layout.method, **layout.config, "ignore": ignored + gates}


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """That of a config.json's weights; None where they are not packed. Raises ValueError for weights quantised otherwise."""
    given = config.get("quantization_config")
    if given is None:
        return None
    for layout in LAYOUTS.values():
        key = "quant_algo" if layout.reciprocal else "format"
        if (given.get("quant_method"), given.get(key)) == (layout.method, layout.config[key]):
            return layout
    found = {key: given[key] for key in ("quant_method", "format", "quant_algo") if key in given}
    raise ValueError(
        f"config.json has quantization_config with {found}: only NVFP4 weights as compressed-tensors ('nvfp4-pack-quantized') and ModelOpt "
        "('W4A16_NVFP4') write them can be imported"
    )


def unpacked(tensors: Iterable[tuple[str, Tensor]], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """The tensors of such a checkpoint, with every weight as its values in fp32. Raises ValueError where one lacks a part."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        module, _, kind = name.rpartition(".")
        if not layout.holds(kind, tensor):
            yield name, tensor.float()
            continue
        parts = waiting.setdefault(module, {})
        parts[kind] = tensor
        if len(parts) == 3:
            yield f"{module}.weight", layout.values(parts)
            del waiting[module]
    for module, parts in waiting.items():
        raise ValueError(
            f"{module} has {', '.join(sorted(parts))}, but not all of {layout.packed}, {layout.scale} and {layout.whole}: copy the checkpoint again"
        )


def linear_names(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Of the tensors on disk, those that are weights of linear layers."""
    return [
        name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2 and not name.endswith("embeddings.weight")
    ]
