"""Lists, verifies, prunes and averages the checkpoints of a run.

python -m train.checkpoints runs/tiny                                       # what there is; sizes are checked
python -m train.checkpoints runs/tiny verify=true                           # checksums, too: every byte is read
python -m train.checkpoints runs/tiny prune=true keep=3 keep_every=1000 dry_run=true
python -m train.checkpoints runs/tiny merge=[240,480] weights=[1,2] to=runs/merged
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel import groups
from parallel.layout import world_size
from train.arguments import key_values
from train.build import build
from train.checkpoint.checkpointer import CHECKPOINTS, load_weights
from train.checkpoint.inventory import Entry, checkpoints_of, plan_pruning, prune, take, unfinished
from train.checkpoint.merge import merge
from train.checkpoint.reader import Checkpoint, open_checkpoint
from train.checkpoint.remote import is_url, locate
from train.checkpoint.retention import Retention
from train.evaluation import measure
from train.lock import Locked, RunLock
from train.observe.lines import duration
from train.observe.metrics import FILE_NAME, read_metrics
from train.recipe.guard import read_yaml
from train.recipe.load import read_recipe
from train.refusal import refuse
from train.rendezvous import adopt
from train.run_directory import copy_description, stored_recipe

KEYS = ("verify", "prune", "keep", "keep_every", "dry_run", "merge", "weights", "to", "evaluate")
EXAMPLE = "python -m train.checkpoints runs/tiny"
NOT_VALID = 1  # exit status of a list with a checkpoint that is not valid


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 1 where verify=true found a checkpoint that is not valid, 2 for wrong arguments."""
    try:
        if not arguments or "=" in arguments[0]:
            raise ValueError(f"the run is missing: {EXAMPLE}")
        run, values = arguments[0], key_values(arguments[1:], KEYS)
        if "merge" in values:
            _only(values, "merge", ("merge", "weights", "to", "evaluate"))
            return _merge(run, values)
        if _truth(values, "prune"):
            _only(values, "prune=true", ("prune", "keep", "keep_every", "dry_run"))
            return _prune(run, values)
        _only(values, "a list", ("verify", "prune"))
        return _list(run, _truth(values, "verify"))
    except (ValueError, OSError) as error:
        return refuse(str(error))
    finally:
        groups.shutdown()


# -- listing ------------------------------------------------------------------------------------------------------------------------------


def _list(run: str, verify: bool) -> int:
    directory = checkpoints_of(_home(run))
    entries, losses = take(directory, verify=verify), _losses(run)
    rows = [_row(entry, losses, "valid" if verify else "complete") for entry in entries]
    print(f"{directory}: {_counted(len(entries), 'checkpoint')}, {_bytes(sum(entry.size for entry in entries))}")
    _print_table(("step", "tokens", "age", "bytes", "eval/loss", "milestone", "state"), rows, left=2)
    for name in unfinished(directory):
        print(f"  {name} is being written, or was left by a run that was cut off: the run's next start clears it away")
    if not verify:
        print("Sizes are as the manifests say; verify=true compares checksums, too.")
    return NOT_VALID if verify and any(entry.problem for entry in entries) else 0


def _row(entry: Entry, losses: dict[int, float], good: str) -> tuple[str, ...]:
    loss = losses.get(entry.step)
    return (
        entry.name.removeprefix("step-").lstrip("0") or "0",
        "" if entry.tokens is None else f"{entry.tokens:,}",
        duration(entry.seconds_old),
        _bytes(entry.size),
        "" if loss is None else f"{loss:.4f}",
        entry.milestone or "",
        good if entry.problem is None else f"NOT VALID: {entry.problem}",
    )


def _losses(run: str) -> dict[int, float]:
    """eval/loss by step, where the run's metrics hold it; a store has none."""
    run_dir = locate(run)
    if not isinstance(run_dir, Path) or not (run_dir / FILE_NAME).is_file():
        return {}
    return {int(entry["step"]): float(entry["eval/loss"]) for entry in read_metrics(run_dir) if "eval/loss" in entry}


# -- pruning ------------------------------------------------------------------------------------------------------------------------------


def _prune(run: str, values: dict[str, Any]) -> int:
    retention = Retention(_whole(values, "keep", 1), _whole(values, "keep_every", 0) if "keep_every" in values else 0)
    directory, dry_run = checkpoints_of(_home(run)), _truth(values, "dry_run")
    # Nothing can be locked by a URL; what a run goes on from stays in either case, and deleting twice does no harm in a store.
    lock = None if dry_run or is_url(run) else RunLock(Path(run).parent if Path(run) == directory else Path(run))
    try:
        if lock is not None:
            lock.acquire()
        pruning = plan_pruning(directory, retention)
        if pruning.spared:
            print(f"{pruning.spared} stays, whatever its age: it is the newest whose checksums are right")
        for name in pruning.doomed:
            print(f"{'would delete' if dry_run else 'deleting'} {directory / name}")
        if not dry_run:
            prune(directory, pruning)
        verb = "would become" if dry_run else "became"
        print(f"{_counted(len(pruning.doomed), 'checkpoint')} of {directory}, {_bytes(pruning.size)}, {verb} free")
    except Locked as error:
        raise ValueError(f"{error}; the run deletes old checkpoints by itself, see checkpoint.keep") from None
    finally:
        if lock is not None:
            lock.release()
    return 0


# -- merging ------------------------------------------------------------------------------------------------------------------------------


def _merge(run: str, values: dict[str, Any]) -> int:
    adopt()
    checkpoints, weights = _chosen(run, values), _weights(values)
    to = values.get("to")
    if not isinstance(to, str) or not to:
        raise ValueError(
            f"to=... is missing, the directory that is made for the merged checkpoint: {EXAMPLE} merge=[240,480] to=runs/merged"
        )
    if (Path(to) / CHECKPOINTS).exists():
        raise ValueError(f"to={to} holds checkpoints already: choose a new directory")
    evaluate = _truth(values, "evaluate", True)
    recipe = stored_recipe(checkpoints[0])
    made = build(read_recipe(recipe, world_size())) if evaluate else None
    is_main = made is None or made.layout.rank == 0
    if is_main:
        copy_description(checkpoints[0], Path(to))
    merged = open_checkpoint(merge(checkpoints, weights, Path(to) / CHECKPOINTS))
    results: list[dict[str, float]] = []
    if made is not None:
        for checkpoint in (*checkpoints, merged):
            load_weights(checkpoint, made.chunks)
            results.append(measure(made, made.recipe.evaluation.chosen(), checkpoint.step))
    if is_main:
        print(f"Merged {len(checkpoints)} checkpoints into {merged.path}:")
        _print_results(checkpoints, weights, results)
        print(f"Start a run from it with checkpoint.initialize_from={to}; train.evaluate and train.export take checkpoint={to}.")
    return 0


def _chosen(run: str, values: dict[str, Any]) -> list[Checkpoint]:
    """The checkpoints that merge=[...] names by step or by milestone, verified."""
    names = values["merge"]
    if not isinstance(names, list) or len(names) < 2:
        raise ValueError(f"merge={names} is no list of at least two steps or milestones: write for instance merge=[240,480]")
    directory = checkpoints_of(_home(run))
    entries = take(directory)
    chosen: list[Checkpoint] = []
    for name in names:
        found = next((entry for entry in entries if name == entry.step or _bare(name) == _bare(entry.milestone)), None)
        if found is None:
            known = ", ".join(str(entry.step) + (f" ({entry.milestone})" if entry.milestone else "") for entry in reversed(entries))
            raise ValueError(f"merge={name} names no checkpoint of {directory}: it holds {known}")
        if any(found.step == other.step for other in chosen):
            raise ValueError(f"merge={name} names step {found.step} twice: give it a larger weight instead")
        chosen.append(open_checkpoint(directory / found.name))
    return chosen


def _bare(milestone: Any) -> str:
    """`4 steps` and `4steps` are one name."""
    return "" if milestone is None else "".join(str(milestone).split())


def _weights(values: dict[str, Any]) -> list[float]:
    number = len(values["merge"])
    weights = values.get("weights", [1] * number)
    if not isinstance(weights, list) or len(weights) != number:
        raise ValueError(f"weights={weights} must hold one number for each of the {number} checkpoints of merge")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"weights={weights} must be numbers above 0: only their ratios count")
    return [float(weight) for weight in weights]


def _print_results(checkpoints: Sequence[Checkpoint], weights: Sequence[float], results: Sequence[dict[str, float]]) -> None:
    names = [f"step {checkpoint.step}" for checkpoint in checkpoints] + ["merged"]
    shares = [f"{weight / sum(weights):.1%}" for weight in weights] + [""]
    metrics = list(results[0]) if results else []
    rows = [
        (name, share, *(f"{results[index][metric]:.4f}" for metric in metrics))
        for index, (name, share) in enumerate(zip(names, shares, strict=True))
    ]
    _print_table(("checkpoint", "weight", *metrics), rows, left=0)
    losses = [result["eval/loss"] for result in results if "eval/loss" in result]
    if losses:
        best = min(losses[:-1])
        side = "below" if losses[-1] < best else "above"
        print(f"  its eval/loss is {abs(losses[-1] - best):.4f} {side} that of {names[losses.index(best)]}, the best of its parts")


def _home(run: str) -> str:
    """The run's directory, or where its recipe says that checkpoints lie."""
    recipe = Path(run) / "recipe.yaml"
    if is_url(run) or not recipe.is_file():
        return run
    stored = read_yaml(recipe.read_bytes(), str(recipe))
    return str((stored.get("checkpoint") or {}).get("storage") or run)


# -- arguments and text -------------------------------------------------------------------------------------------------------------------


def _only(values: dict[str, Any], what: str, allowed: Sequence[str]) -> None:
    for key in values:
        if key not in allowed:
            raise ValueError(f"{key}={values[key]} says nothing about {what}: leave it out")


def _truth(values: dict[str, Any], key: str, otherwise: bool = False) -> bool:
    value = values.get(key, otherwise)
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value} is neither true nor false")
    return value


def _whole(values: dict[str, Any], key: str, least: int) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        given = f"{key}=... is missing" if value is None else f"{key}={value} is no whole number of at least {least}"
        raise ValueError(f"{given}: {EXAMPLE} prune=true keep=3")
    return value


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bytes(size: int) -> str:
    for unit, letters in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {letters}"
    return f"{size} bytes"


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    """left: so many of the last columns hold words; 0: the first one does."""
    words = range(len(head) - left, len(head)) if left else range(1)
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(("  " + "  ".join(cells)).rstrip())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
