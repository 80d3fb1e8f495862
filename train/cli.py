"""The command line of every command that takes a recipe: Hydra composes it, one sentence answers a mistake.

    -cn NAME               a recipe of recipes/ (tiny, small, nemotron3_nano, nemotron3_super, nemotron3_ultra)
    key=value              any key of the recipe; a group too: precision=mxfp8
    --cfg job              print the composed recipe and stop
    -m key=a,b,c           a sweep: every combination is a process and a run directory of its own; finished ones are skipped

All keys with their defaults form the base every recipe is merged over, so a key needs no `+`; the composed result is read into dataclasses
(`train.recipe`) and nothing passes OmegaConf objects on.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parallel.layout import world_size
from train.reading import RecipeError, defaults, flatten
from train.recipe import Recipe, read_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
REQUIRED = {  # keys without a default: null in the base, so that they too can be overridden without `+`
    "train": ("global_batch_size", "micro_batch_size", "sequence_length"),
    "model": ("pattern", "vocab_size", "hidden_size"),
    "optimizer": ("learning_rate",),
}
MISSING = "???"
# Hydra neither changes directories nor writes files or log lines of its own.
QUIET = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def base() -> dict[str, Any]:
    """Every key of a recipe; those a recipe must give are missing."""
    tree = defaults(Recipe)
    for group, keys in REQUIRED.items():
        for key in keys:
            tree.setdefault(group, {}).setdefault(key, MISSING)
    return tree


def one_sentence(error: BaseException) -> str:
    """What Hydra and OmegaConf say over many lines, as one sentence with a remedy."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    cause = error.__cause__
    if cause is not None and isinstance(cause, HydraException | OmegaConfBaseException):
        text = f"{text} {' '.join(line.strip() for line in str(cause).splitlines() if line.strip())}"
    for noise in ("Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.", "object_type=dict"):
        text = text.replace(noise, "")
    return text.strip()


def _unknown_key(error: BaseException, arguments: Sequence[str]) -> str | None:
    """Hydra says `Could not override 'a.b'` for a key that does not exist: name the nearest that does."""
    import difflib

    text = str(error)
    if "Could not override" not in text:
        return None
    key = text.split("'")[1]
    given = next((a for a in arguments if a.lstrip("+~").startswith(f"{key}=")), key)
    known = [name for name, _ in flatten(base())]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see the recipe with --cfg job"
    return f"{given} sets no key of a recipe: {hint}"


def main(run: Callable[[Recipe], int], module: str, arguments: Sequence[str] | None = None) -> int:
    """Composes the recipe, validates it and calls `run`; returns the exit status (2: the recipe or the command line is wrong).

    module: the command's name for the processes of a sweep, as in `python -m MODULE`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    store = ConfigStore.instance()
    store.store(name="base", node=base())
    status = 0
    failed: list[str] = []
    swept = 0

    def task(config: DictConfig) -> None:
        nonlocal status, swept
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            swept += 1
            if not _sweep_job(module):
                failed.append(" ".join(HydraConfig.get().overrides.task))
            return
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        assert isinstance(values, dict)
        status = run(read_recipe(_without_missing(values), world_size()))  # type: ignore[arg-type]

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed
    saved, sys.argv = sys.argv, [f"python -m {module}", *arguments, *QUIET]
    try:
        hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="tiny")(task)()
    except RecipeError as error:
        return _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(_unknown_key(error, arguments) or one_sentence(error))
    finally:
        sys.argv = saved
    if swept:
        print(f"sweep: {swept} job{'s' * (swept > 1)}, {swept - len(failed)} finished, {len(failed)} failed")
        for job in failed:
            print(f"  failed: {job}")
        return 1 if failed else 0
    return status


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _without_missing(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_missing(value) for key, value in values.items() if value != MISSING}
    return values


def _sweep_job(module: str) -> bool:
    """Runs one job of a sweep in a process of its own; True when it finished (now or in an earlier sweep)."""
    import subprocess

    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    if not any(o.startswith("run.dir=") for o in overrides):
        label = hydra_config.job.override_dirname.replace("/", "_").replace(",", "__") or "job"
        overrides.append(f"run.dir=runs/{hydra_config.job.config_name}-sweep/{_plain_name(label)}")
    run_dir = Path(next(o for o in reversed(overrides) if o.startswith("run.dir=")).split("=", 1)[1])
    if (run_dir / "finished.json").exists():
        print(f"sweep: {run_dir} is finished, skipped")
        return True
    print(f"sweep: {run_dir}")
    sys.stdout.flush()
    command = [sys.executable, "-m", module, "-cn", str(hydra_config.job.config_name), *overrides]
    return subprocess.run(command, check=False).returncode == 0


def _plain_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "=._-" else "_" for c in label)
