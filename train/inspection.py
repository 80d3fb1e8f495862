"""What one rank of a layout would hold and with whom it would talk: the run's own groups and modules, of a world that is only imagined.

    python -m parallel.inspect -cn nemotron3_super world=1024 rank=137

world: ranks; default the fewest the layout fits. rank: from 0, default 0. Everything else as for `python -m train`. Nothing is allocated: the
process group sends nothing, and parameters lie on the meta device.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.hybrid import HybridModel
from model.layer import Layer
from parallel import groups
from parallel.layout import Layout
from parallel.shards import Spread, spread_of
from train.build import build_model
from train.optimizer import open_optimizer
from train.recipe.cli import main as with_recipe
from train.recipe.tree import Recipe
from train.refusal import refuse

SHARED_OVER: dict[Spread, str] = {
    "rows": "rows over tensor",
    "columns": "columns over tensor",
    "everywhere": "whole",
    "expert_rows": "experts over expert, rows over expert_tensor",
    "expert_columns": "experts over expert, columns over expert_tensor",
}


@dataclass
class Held:
    """Parameters of one kind. local: on this rank; whole: of the same tensors on all ranks that share them out; replicas: ranks that hold the same
    part; optimizers: ranks that a distributed optimizer shares the part out over."""

    local: int = 0
    whole: int = 0
    replicas: int = 1
    optimizers: int = 1


def held(chunks: Sequence[HybridModel], layout: Layout) -> dict[tuple[str, Spread], Held]:
    """What this rank holds, by what it belongs to and how ranks share it out."""
    experts = layout.expert_size * layout.expert_tensor_size
    parts = {"rows": layout.tensor_size, "columns": layout.tensor_size, "everywhere": 1, "expert_rows": experts, "expert_columns": experts}
    found: dict[tuple[str, Spread], Held] = defaultdict(Held)
    for chunk in chunks:
        owners = {
            id(param): f"{layer.kind.name} layers"
            for layer in chunk.modules()
            if isinstance(layer, Layer)
            for param in layer.mixer.parameters()
        }
        for name, param in chunk.named_parameters():
            spread = spread_of(param) or "everywhere"
            owner = owners.get(id(param), "norms" if "norm" in name else name.split(".")[0])
            one = found["MTP" if name.startswith("mtp.") else owner, spread]
            one.local += param.numel()
            one.whole += param.numel() * parts[spread]
            one.replicas = layout.world_size // (layout.pipeline_size * parts[spread])
            one.optimizers = layout.expert_data_size if spread.startswith("expert") else layout.data_size * layout.context_size
    return dict(found)


def members(ranks: Sequence[int]) -> str:
    """`0 to 1022 by 2`, `136, 137`: ranks in rising order, for a person."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and (len(runs[-1]) == 1 or rank - runs[-1][-1] == runs[-1][1] - runs[-1][0]):
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = []
    for run in runs:
        step = run[1] - run[0] if len(run) > 1 else 1
        by = f" by {step}" if step > 1 else ""
        shown.append(f"{run[0]} to {run[-1]}{by}" if len(run) > 2 else ", ".join(map(str, run)))
    return ", ".join(shown)


def describe(recipe: Recipe, layout: Layout, chunks: Sequence[HybridModel]) -> str:
    """Several lines for a person."""
    axes = ("tensor", "context", "pipeline", "data", "expert", "expert_tensor", "expert_data")
    places = [f"{axis} {getattr(layout, f'{axis}_rank')} of {getattr(layout, f'{axis}_size')}" for axis in axes]
    lines = [f"{recipe.run.name}, rank {layout.rank} of {layout.world_size}", f"  places    {', '.join(places)}"]
    for chunk in chunks:
        letters = " ".join(f"{index}{layer.kind.letter}" for index, layer in chunk.layers.items() if isinstance(layer, Layer))
        ends = [name for name, there in (("embedding", chunk.embeddings is not None), ("head, MTP", chunk.is_last)) if there]
        lines.append(f"  layers    {letters}  ({', '.join(ends) or 'neither embedding nor head'})")
    lines.append("")
    found = {
        "tensor": layout.groups.tp,
        "context": layout.groups.cp,
        "pipeline": layout.groups.pp,
        "data x context": layout.groups.dp_cp,
        "expert": layout.groups.ep,
        "expert_tensor": layout.groups.expt_tp,
        "expert_data": layout.groups.expt_dp,
    }
    for name, group in found.items():
        ranks = dist.get_process_group_ranks(group)
        lines.append(f"  {name:14}  {len(ranks):5} rank{'s' * (len(ranks) > 1):1}  {members(ranks)}")
    return "\n".join([*lines, "", *_table(recipe, layout, chunks)])


def _table(recipe: Recipe, layout: Layout, chunks: Sequence[HybridModel]) -> list[str]:
    dtype = next(chunks[0].parameters()).dtype
    state = open_optimizer(recipe.optimizer).room(torch.empty(1, device="meta"))
    moments = sum(4 for tensor in state.values() if tensor.dim())
    master = 4 if dtype != torch.float32 else 0
    lines = [f"  {'parameters':44}  {'on this rank':>14}  {'on all':>14}  {'replicas':>8}  {'bytes':>14}  shared out"]
    total = [0, 0, 0]
    for (owner, spread), one in sorted(held(chunks, layout).items()):
        kept = (master + moments) / (one.optimizers if recipe.parallel.distributed_optimizer else 1)
        size = round(one.local * (dtype.itemsize + 4 + kept))
        lines.append(f"  {owner:44}  {one.local:14,}  {one.whole:14,}  {one.replicas:8}  {size:14,}  {SHARED_OVER[spread]}")
        total = [total[0] + one.local, total[1] + one.whole, total[2] + size]
    lines.append(f"  {'together':44}  {total[0]:14,}  {total[1]:14,}  {'':8}  {total[2]:14,}")
    split = "shared out over replicas" if recipe.parallel.distributed_optimizer else "whole on each"
    lines.append(
        f"  bytes: weights {dtype.itemsize}, gradients 4, fp32 master {master} and moments {moments} an element, the last two {split}; no activations"
    )
    return lines


def split(arguments: Sequence[str]) -> tuple[int | None, int, list[str]]:
    """world, rank, and the arguments of `python -m train`. Raises ValueError, in one sentence, for numbers that cannot be."""
    numbers: dict[str, int] = {}
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in ("world", "rank"):
            rest.append(argument)
            continue
        if not value.isdigit() or int(value) < (key == "world"):
            raise ValueError(f"{argument} is no {'number of ranks' if key == 'world' else 'rank'}: use for instance world=1024 rank=137")
        numbers[key] = int(value)
    return numbers.get("world"), numbers.get("rank", 0), rest


def main(arguments: Sequence[str]) -> int:
    """Prints it; returns the exit status."""
    try:
        world, rank, rest = split(arguments)
    except ValueError as error:
        return refuse(str(error))

    def show(recipe: Recipe) -> int:
        ranks = world or recipe.parallel.fewest_ranks()
        if rank >= ranks:
            return refuse(f"rank={rank} is none of the {ranks} ranks: use rank={ranks - 1} or less")
        with groups.imagined(recipe.parallel, ranks, rank) as layout:
            print(describe(recipe, layout, build_model(recipe, layout)[1]))
        return 0

    return with_recipe(show, "parallel.inspect", rest, ranks=world or "fewest")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
