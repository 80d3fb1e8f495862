"""The command line of every command that takes a recipe: Hydra composes it, one sentence answers a mistake.

    -cn NAME               a recipe of recipes/ (tiny, small, nemotron3_nano, nemotron3_super, nemotron3_ultra,
                           nemotron3_5_lightning)
    key=value              any key of the recipe; a group too: precision=mxfp8
    --help [GROUP]         every key, or those of a group, with type, default and meaning
    --cfg job              print the composed recipe and stop
    -m key=a,b,c           a sweep, see `train.recipe.sweep`

Exit status: 0 done, 1 failed, 2 the recipe is wrong, 75 stopped by SIGTERM, SIGINT or SIGUSR1 with a checkpoint (the same command goes on), 130 a
second SIGINT.

All keys with their defaults form the base every recipe is merged over, so a key needs no `+`; the composed result is read into dataclasses
(`train.recipe`) and nothing passes OmegaConf objects on.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from parallel.layout import world_size
from train.recipe.guard import check_directory, check_hydra, forbid_environment
from train.recipe.help import help_text
from train.recipe.load import RECIPES, plain_values, ranks_of_cluster, read_recipe, store_base
from train.recipe.reading import RecipeError
from train.recipe.sentences import one_sentence
from train.recipe.sweep import Job, Sweep, shared_directory
from train.recipe.tree import Recipe
from train.refusal import refuse

# Hydra neither changes directories nor writes files or log lines of its own; of a sweep, it writes multirun.yaml beside the jobs.
QUIET = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=runs/${hydra.job.config_name}-sweep",
    "hydra.sweep.subdir=.",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)

DEFAULT = "tiny"
FORBIDDEN = ("-cp", "--config-path", "--experimental-rerun")  # Hydra's: from anywhere, and from a pickle


def main(
    run: Callable[[Recipe], int],
    module: str,
    arguments: Sequence[str] | None = None,
    *,
    ranks: int | Literal["started", "fewest", "cluster"] = "started",
    trains: bool = False,
    each: Callable[[Job, Recipe], None] | None = None,
) -> int:
    """Composes the recipe, validates it and calls `run`; returns the exit status (2: the recipe or the command line is wrong).

    module: the command's name for the processes of a sweep, as in `python -m MODULE`. ranks: on which the recipe is to run: those that were
    started, or a number of them, or the fewest it fits, for a recipe that is only looked at, or those of its `cluster`. trains: `run` trains, so
    that a sweep skips what is finished. each: called for every job of a sweep, instead of a process that does it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    store_base()
    status = 0
    # argparse takes positional arguments from one place only, and people write options after overrides too.
    overrides = [a for a in arguments if a.startswith("~") or ("=" in a and not a.startswith("-"))]
    options = [a for a in arguments if a not in overrides]
    number: int | None = None

    def read(values: dict[str, Any]) -> Recipe:
        return read_recipe(values, ranks_of_cluster(values) if ranks == "cluster" else number)

    hand_on = None if each is None else lambda job, values: each(job, read(values))
    directory = _config_directory(options)
    sweep = Sweep(module, overrides, directory, trains=trains, each=hand_on)

    def task(config: DictConfig) -> None:
        nonlocal status
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            sweep.run_job(config)
            return
        try:
            status = run(read(plain_values(config)))
        except RecipeError as error:  # Hydra would print a line of its own around an exception
            status = refuse(str(error))

    if {"-h", "--help"} & set(options):
        within = next((a for a in options[options.index("-h" if "-h" in options else "--help") + 1 :] if not a.startswith("-")), None)
        try:
            print(help_text(module, within))
        except ValueError as error:
            return refuse(str(error))
        return 0
    if {"-m", "--multirun"} & set(options) and (shared := shared_directory(overrides)) is not None:
        return refuse(f"{shared} would be the run directory of every job of the sweep: leave it out, each job gets one of its own")
    try:
        number = world_size() if ranks == "started" else ranks if isinstance(ranks, int) else None
    except ValueError as error:
        return refuse(str(error))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed
    saved, sys.argv = sys.argv, [f"python -m {module}", *options, *overrides, *QUIET, "hydra.searchpath=[]"]
    try:
        forbid_environment()
        _check(options, overrides, directory)
        hydra.main(version_base="1.3", config_path=str(RECIPES), config_name=DEFAULT)(task)()
    except RecipeError as error:
        return refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return refuse(one_sentence(error, arguments))
    finally:
        sys.argv = saved
    return sweep.finish() if sweep.jobs else status


def _check(options: Sequence[str], overrides: Sequence[str], directory: Sequence[str]) -> None:
    """Raises RecipeError, or Hydra's exceptions, for what could do harm before the recipe is read, see `train.recipe.guard`."""
    for option in options:
        if option.split("=")[0] in FORBIDDEN:
            raise RecipeError(f"{option} is not taken here: name a directory of recipes with --config-dir")
    extra = None if not directory else Path(directory[0].split("=", 1)[1] if "=" in directory[0] else directory[-1]).absolute()
    if extra is not None:
        check_directory(extra)
    name = _value_of(options, ("-cn", "--config-name")) or DEFAULT
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    kept = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    check_hydra(RECIPES, extra, name, [*kept, *QUIET])


def _value_of(options: Sequence[str], names: Sequence[str]) -> str | None:
    """Of an option, written as `-cn NAME`, `--config-name NAME` or `--config-name=NAME`."""
    for place, option in enumerate(options):
        given, _, value = option.partition("=")
        if given in names:
            return value or next(iter(options[place + 1 :]), None)
    return None


def _config_directory(options: Sequence[str]) -> list[str]:
    """Hydra's option that adds a directory of recipes, as it was given."""
    for place, option in enumerate(options):
        if option.startswith(("--config-dir", "-cd")):
            return list(options[place : place + (1 if "=" in option else 2)])
    return []
