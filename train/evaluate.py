"""Evaluates a checkpoint with the evaluators of its recipe (`evaluation.evaluators`), with others, or with tasks of the lm-evaluation-harness.

python -m train.evaluate checkpoint=runs/tiny          # a run, or one checkpoint of it
python -m train.evaluate checkpoint=runs/tiny evaluators=[validation,acceptance]
python -m train.evaluate checkpoint=runs/tiny evaluators=[mqar] evaluation.mqar.tasks=[64x4]
python -m train.evaluate checkpoint=runs/tiny tasks=[lambada_openai] batch=16 to=results.json
python -m train.evaluate checkpoint=runs/tiny tasks=[my_task] include=my_tasks

tasks: by the harness's names; they need pip install -c constraints.txt -e '.[eval]'. include: a directory with task files of one's own.
limit: requests of each task. batch: texts at a time (8). max_length: tokens of a text, of which a longer one loses its beginning; by default as
many as in training. precision, weights: as of python -m train.generate. to: a file that gets all that the harness says, as JSON.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from parallel import groups
from parallel.layout import world_size
from train.arguments import key_values
from train.build import build
from train.checkpoint.checkpointer import load_weights
from train.checkpoint.reader import Checkpoint, open_checkpoint
from train.evaluation import measure
from train.generation.speaker import open_speaker
from train.observe.lines import evaluation_text
from train.recipe.load import read_recipe
from train.refusal import refuse
from train.rendezvous import adopt
from train.run_directory import stored_recipe

OF_TASKS = ("include", "limit", "batch", "max_length", "precision", "weights", "to")


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        if "--help" in arguments or "-h" in arguments:
            print(__doc__)
            return 0
        adopt()
        of_evaluators = [argument.split("=")[0] for argument in arguments if argument.startswith("evaluation.")]
        values = key_values(arguments, ("checkpoint", "evaluators", "tasks", *OF_TASKS, *of_evaluators))
        if not isinstance(values.get("checkpoint"), str):
            raise ValueError("checkpoint=... is missing: python -m train.evaluate checkpoint=runs/tiny")
        for key in OF_TASKS:
            if key in values and "tasks" not in values:
                raise ValueError(
                    f"{key}={values[key]} is for tasks of the lm-evaluation-harness: give tasks=[...] with it, or leave it out"
                )
        if "tasks" in values and "evaluators" in values:
            raise ValueError("tasks=... and evaluators=... are two ways to evaluate: give one of them")
        if "tasks" in values:
            _harness(values)
        else:
            changes = {key: values[key] for key in of_evaluators}
            if "evaluators" in values:
                changes["evaluation.evaluators"] = values["evaluators"]
            _evaluators(open_checkpoint(values["checkpoint"]), changes)
    except (ValueError, OSError) as error:
        return refuse(str(error))
    finally:
        groups.shutdown()
    return 0


def _evaluators(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> None:
    """changes: of the recipe, by dotted keys of `evaluation`."""
    recipe = deepcopy(dict(stored_recipe(checkpoint)))
    for key, value in changes.items():
        group = recipe
        *path, last = key.split(".")
        for name in path:
            group = group.setdefault(name, {})
            if not isinstance(group, dict):
                raise ValueError(f"{key}={value}: {name} is no group of keys: docs/recipes.md has those of every evaluator")
        group[last] = value
    run = build(read_recipe(recipe, world_size()))
    load_weights(checkpoint, run.chunks)
    metrics = measure(run, run.recipe.evaluation.chosen(), checkpoint.step)
    if run.layout.rank == 0:
        print(f"{checkpoint.path}: " + (evaluation_text(metrics) or "nothing was measured: there is no validation text"))


def _harness(values: Mapping[str, Any]) -> None:
    if world_size() > 1:
        raise ValueError("tasks are done by one process: start python -m train.evaluate without a launcher")
    tasks = values["tasks"] if isinstance(values["tasks"], list) else [values["tasks"]]
    if not tasks or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"tasks={values['tasks']} is no list of names: tasks=[lambada_openai,piqa]")
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"tasks=[{','.join(tasks)}] needs the package lm_eval, which is not installed: pip install -c constraints.txt -e '.[eval]'"
        )
    include = values.get("include")
    if include is not None and not Path(str(include)).is_dir():
        raise ValueError(f"include={include} is no directory: give one with task files (YAML)")
    numbers = {key: _count(values, key) for key in ("limit", "batch", "max_length")}
    to = Path(str(values["to"])) if "to" in values else None
    if to is not None:  # what cannot be written is said before anything is computed
        to.parent.mkdir(parents=True, exist_ok=True)
        to.touch()
    checkpoint = open_checkpoint(values["checkpoint"])
    from train.harness import run_tasks  # an optional package, which takes many seconds to import

    precision = str(values.get("precision", "bf16" if torch.cuda.is_available() else "fp32"))
    speaker = open_speaker(checkpoint, precision, str(values.get("weights", "stored")))
    results = run_tasks(
        speaker,
        tasks,
        include=None if include is None else str(include),
        batch=numbers["batch"] or 8,
        max_length=numbers["max_length"] or speaker.recipe.train.sequence_length,
        limit=numbers["limit"],
    )
    from lm_eval.utils import make_table

    print(make_table(results).rstrip())
    if to is not None:
        to.write_text(json.dumps(results, indent=1, default=str) + "\n")


def _count(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{key}={value} must be a whole number of at least 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
