"""Evaluates a checkpoint with the evaluators of its recipe (`evaluation.evaluators`), or with others.

python -m train.evaluate checkpoint=runs/tiny          # a run, or one checkpoint of it
python -m train.evaluate checkpoint=runs/tiny evaluators=[validation,acceptance]
"""

import sys
from collections.abc import Sequence

from parallel import groups
from parallel.layout import world_size
from train.arguments import key_values
from train.build import build
from train.checkpoint.checkpointer import load_weights
from train.checkpoint.reader import open_checkpoint
from train.evaluation import measure
from train.observe.lines import evaluation_text
from train.recipe.load import read_recipe
from train.refusal import refuse
from train.rendezvous import adopt
from train.run_directory import stored_recipe


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        adopt()
        values = key_values(arguments, ("checkpoint", "evaluators"))
        if not isinstance(values.get("checkpoint"), str):
            raise ValueError("checkpoint=... is missing: python -m train.evaluate checkpoint=runs/tiny")
        checkpoint = open_checkpoint(values["checkpoint"])
        recipe = dict(stored_recipe(checkpoint))
        if "evaluators" in values:
            recipe["evaluation"] = {**recipe.get("evaluation", {}), "evaluators": values["evaluators"]}
        run = build(read_recipe(recipe, world_size()))
        load_weights(checkpoint, run.chunks)
        metrics = measure(run, run.recipe.evaluation.chosen(), checkpoint.step)
    except (ValueError, OSError) as error:
        return refuse(str(error))
    finally:
        groups.shutdown()
    if run.layout.rank == 0:
        print(f"{checkpoint.path}: " + (evaluation_text(metrics) or "nothing was measured: there is no validation text"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
