"""What a rank of a run last wrote.

    python -m launch.logs runs/x                           # rank 0
    python -m launch.logs runs/x rank=3 follow=true        # goes on until Ctrl-C; lines=200 for more of what was before

The log of the job itself (`<run>/logs/slurm-*.log`) stands before that of the rank: there srun and the preflight say why a job ended.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.script import LOGS
from train.arguments import key_values
from train.refusal import refuse

LINES = 30
INTERVAL = 0.5  # seconds between two looks
TAIL = 1 << 20  # bytes that are searched for the last lines


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        paths, follow, lines = _read(arguments)
    except ValueError as error:
        return refuse(str(error))
    ends: dict[Path, int] = {}
    for path in paths:
        print(f"==> {path} <==")
        ends[path] = _print_last(path, lines)
    try:
        while follow:
            time.sleep(INTERVAL)
            for path in paths:
                ends[path] = _print_from(path, ends[path])
    except KeyboardInterrupt:
        pass
    return 0


def _read(arguments: Sequence[str]) -> tuple[list[Path], bool, int]:
    """The files, whether to go on, and how many lines of each."""
    named = [argument for argument in arguments if "=" not in argument]
    values = key_values([argument for argument in arguments if argument not in named], ("rank", "follow", "lines"))
    rank, follow, lines = values.get("rank", 0), values.get("follow", False), values.get("lines", LINES)
    if len(named) != 1:
        raise ValueError("name the directory of one run: python -m launch.logs runs/x rank=0")
    for key, value in (("rank", rank), ("lines", lines)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{key}={value} is no number from 0 up")
    if not isinstance(follow, bool):
        raise ValueError(f"follow={follow} is neither true nor false")
    logs = Path(named[0]) / LOGS
    if not logs.is_dir():
        raise ValueError(f"{logs} does not exist: a run that python -m launch.slurm submitted has its logs there, any other <run>/log.txt")
    of_rank = logs / f"rank-{rank:05d}.log"
    of_job = sorted(logs.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)[-1:]
    if not of_rank.exists() and rank:
        known = sorted(int(path.stem.removeprefix("rank-")) for path in logs.glob("rank-*.log"))
        raise ValueError(
            f"rank={rank} has no log in {logs}: " + (f"there are ranks 0 to {known[-1]}" if known else "no rank has started yet")
        )
    return [*of_job, *([of_rank] if of_rank.exists() else [])], follow, lines


def _print_last(path: Path, lines: int) -> int:
    """Returns where the file ended."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        text = file.read()
    kept = text.splitlines(keepends=True)[-lines:] if lines else []
    sys.stdout.write(b"".join(kept).decode(errors="replace"))
    sys.stdout.flush()
    return size


def _print_from(path: Path, begin: int) -> int:
    if path.stat().st_size <= begin:
        return begin
    with path.open("rb") as file:
        file.seek(begin)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return begin + len(text)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
