"""Layouts, measured: `python -m tests.layouts to=runs/layouts.jsonl`.

part    matrix: every layout of tests/layouts/cases.py; random: layouts that are drawn; reshard: from layout to layout; nvfp4: in that
            format; default matrix
to      a file; results are appended to it, and a sweep that was ended goes on behind them
seed    of what is drawn; default: another one every time
count   how many layouts are drawn, default 20; of the other parts, how many are measured now, default all
"""

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.layouts import nvfp4, reshard
from tests.layouts.cases import MATRIX
from tests.layouts.compare import Comparison
from tests.layouts.drawing import drawn
from tests.layouts.sweep import go_on, of_cases, table
from tests.ranks import RankPool
from train.arguments import key_values
from train.refusal import refuse


def main(arguments: Sequence[str]) -> int:
    values = key_values(arguments, ("part", "to", "seed", "count"))
    part, to = values.get("part", "matrix"), Path(values.get("to", "runs/layouts.jsonl")).absolute()
    count = values.get("count")
    if part not in ("matrix", "random", "reshard", "nvfp4"):
        return refuse(f"part={part} is none: use matrix, random, reshard or nvfp4")
    pool = RankPool()
    try:
        comparison = Comparison(pool, to.parent)
        if part == "matrix":
            lines = go_on(to, part, of_cases(comparison, MATRIX), count)
        elif part == "random":
            seed = values.get("seed", secrets.randbelow(10**6))
            print(f"seed={seed}", flush=True)
            lines = go_on(to, part, of_cases(comparison, drawn(seed, count or 20)))
        elif part == "nvfp4":
            lines = go_on(to, part, nvfp4.Quantised(pool, to.parent).of_cases(), count)
        else:
            lines = go_on(to, part, reshard.of_pairs(to.parent / "reshard"), count)
    finally:
        pool.stop()
    print({"reshard": reshard.table, "nvfp4": nvfp4.table}.get(part, table)(lines))
    return int(any(line["problems"] for line in lines))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
