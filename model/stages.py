"""Which layers each part of a pipeline holds: as `|` in the pattern says, or so that the parts cost about the same.

With `parallel.virtual_pipeline` each stage holds several parts, which it takes turns with: of p stages, stage s holds parts s, s + p, s + 2 p ...

A part costs the forward FLOPs of its layers, those of attention and SSD included (backward costs twice as much everywhere). The last part has the
output head and the multi-token prediction too: in Nemotron 3 Super, whose head is used three times, these have the FLOPs of 16 average layers.
"""

import math
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import itemgetter

from model.config import ModelConfig
from model.count import linear_modules, other_products
from model.hybrid import Part
from parallel.layout import ParallelConfig
from parallel.misfit import Misfit


def layer_costs(config: ModelConfig, sequence_length: int) -> tuple[list[float], float]:
    """Forward FLOPs per token of every layer of the stack, and of what follows it: the head and the MTP blocks, each as often as it is used."""
    letters, behind = "".join(sorted(set(config.layers))), 0.0
    one_each = config.changed(pattern="/".join((letters, *config.parsed.mtp)))  # small: layers of a letter cost the same
    kinds = dict.fromkeys(letters, 0.0)
    work = [(module.name, module.flops) for module in linear_modules(one_each)]
    work += [(products.module, products.flops) for products in other_products(one_each, sequence_length)]
    for module, flops in work:
        if found := re.match(r"layers\.(\d+)\.", module):
            kinds[letters[int(found[1])]] += flops
        else:
            behind += flops
    return [kinds[letter] for letter in config.layers], behind


def balanced(costs: Sequence[float], behind: float, stages: int, virtual: int = 1) -> list[range]:
    """Cuts layers of these costs into stages * virtual contiguous parts of at least one layer each, the last with `behind` on top, so that stages
    cost about the same: where `behind` makes the last part of the last stage expensive, its other parts get less.

    Of all cuts the one whose parts come closest (least squares) to what each of them should cost.
    """
    count, parts = len(costs), stages * virtual
    sums = [0.0, *accumulate(costs)]
    share = (sums[-1] + behind) / stages  # of a stage
    last = max(share / virtual, behind + costs[-1])
    beside = max(share - last, 0.0) / max(virtual - 1, 1)  # each of the other parts of the last stage
    other = (sums[-1] + behind - last - beside * (virtual - 1)) / max((stages - 1) * virtual, 1)
    wanted = [beside if part % stages == stages - 1 else other for part in range(parts - 1)] + [last - behind]
    best: list[tuple[float, list[int]]] = [(0.0, []), *((math.inf, []) for _ in costs)]  # distance, and where parts end, by layers used up
    for part, target in enumerate(wanted):
        best = [
            min(
                ((best[start][0] + (sums[stop] - sums[start] - target) ** 2, [*best[start][1], stop]) for start in range(part, stop)),
                key=itemgetter(0),
                default=(math.inf, []),
            )
            for stop in range(count + 1)
        ]
    return [range(a, b) for a, b in pairwise([0, *best[count][1]])]


def check_parts(config: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises Misfit where the layers, or `|` in the pattern, do not give as many parts as the layout has."""
    count, given, layers = parallel.pipeline * parallel.virtual_pipeline, config.parsed.parts, len(config.layers)
    of, keys = f"parallel.pipeline={parallel.pipeline}", ["parallel.pipeline"]
    if parallel.virtual_pipeline > 1:
        of += f" x parallel.virtual_pipeline={parallel.virtual_pipeline} = {count}"
        keys.append("parallel.virtual_pipeline")
    if count > layers:
        raise Misfit(f"{of} exceeds the {layers} layers of model.pattern, and every part of the pipeline needs one", *keys)
    if given and len(given) != count:
        raise Misfit(
            f"model.pattern={config.pattern!r} has {len(given)} parts between its '|', but {of}",
            *keys,
            otherwise="leave '|' out, which balances stages by cost",
        )


def pipeline_parts(config: ModelConfig, parallel: ParallelConfig, sequence_length: int) -> list[Part]:
    """Every part of the pipeline, in the order in which a token passes them. Raises Misfit, see `check_parts`."""
    check_parts(config, parallel)
    count, given, layers = parallel.pipeline * parallel.virtual_pipeline, config.parsed.parts, len(config.layers)
    if given:
        ranges = [range(a, b) for a, b in pairwise([0, *accumulate(given)])]
    elif count == 1:
        ranges = [range(layers)]
    else:
        ranges = balanced(*layer_costs(config, sequence_length), parallel.pipeline, parallel.virtual_pipeline)
    return [Part(held, first=number == 0, last=number == count - 1) for number, held in enumerate(ranges)]


def parts_of_stage(parts: Sequence[Part], stages: int, stage: int) -> list[Part]:
    """Those of one pipeline stage, one or, with a virtual pipeline, several."""
    return list(parts[stage::stages])


def describe(config: ModelConfig, parallel: ParallelConfig, sequence_length: int) -> list[str]:
    """A line for each stage, for a person; none without a pipeline."""
    if parallel.pipeline == 1:
        return []
    parts = pipeline_parts(config, parallel, sequence_length)
    costs, behind = layer_costs(config, sequence_length)
    whole = sum(costs) + behind
    lines = []
    for stage in range(parallel.pipeline):
        held = parts_of_stage(parts, parallel.pipeline, stage)
        texts = [f"layers {p.layers.start}-{p.layers.stop - 1} {config.layers[p.layers.start : p.layers.stop]}" for p in held]
        if held[0].first:
            texts.insert(0, "embedding")
        if held[-1].last:
            texts.append("head" + f" and {config.mtp_depths} MTP depths" * (config.mtp_depths > 0))
        share = (sum(costs[i] for p in held for i in p.layers) + behind * held[-1].last) / whole
        lines.append(f"pipeline stage {stage}: {', '.join(texts)}; {share:.0%} of the FLOPs")
    return lines
