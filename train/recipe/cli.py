"""The command line of every command that takes a recipe: Hydra composes it, one sentence answers a mistake.

    -cn NAME               a recipe of recipes/ (tiny, small, nemotron3_nano, nemotron3_super, nemotron3_ultra)
    key=value              any key of the recipe; a group too: precision=mxfp8
    --cfg job              print the composed recipe and stop
    -m key=a,b,c           a sweep: every combination is a process and a run directory of its own; finished ones are skipped

All keys with their defaults form the base every recipe is merged over, so a key needs no `+`; the composed result is read into dataclasses
(`train.recipe`) and nothing passes OmegaConf objects on.
"""

import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parallel.layout import world_size
from train.observe.redact import redacted
from train.recipe.load import RECIPES, base, read_recipe, store_base, without_missing
from train.recipe.reading import RecipeError, flatten
from train.recipe.resume import changed_keys
from train.recipe.tree import Recipe

# Hydra neither changes directories nor writes files or log lines of its own; of a sweep, it writes multirun.yaml beside the jobs.
QUIET = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=runs/${hydra.job.config_name}-sweep",
    "hydra.sweep.subdir=.",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def one_sentence(error: BaseException, arguments: Sequence[str]) -> str:
    """What Hydra and OmegaConf say over many lines, as one sentence with a remedy."""
    text = " ".join(str(error).split())
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    if (match := re.search(r"Cannot find primary config '([^']*)'", text)) is not None:
        return f"-cn {match[1]} names no recipe: use one of {recipes}"
    if (match := re.search(r"Could not find '([^'/]+)/([^']*)'", text)) is not None:
        options = ", ".join(sorted(path.stem for path in (RECIPES / match[1]).glob("*.yaml")))
        return f"{match[1]}={match[2]} is no group option: use one of {options}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not understood: write key=value, lists as key=[a,b], and quote what a shell or Hydra would read otherwise"
    if "no such key" in text.lower() or "Could not override" in text or "is not in struct" in text:
        return _unknown_key(error, arguments) or f"{text}: see the keys with --cfg job"
    return f"{text}: see the keys with --cfg job"


def _unknown_key(error: BaseException, arguments: Sequence[str]) -> str | None:
    """Hydra says `Could not override 'a.b'` for a key that does not exist: name the nearest that does."""
    text = str(error)
    if "Could not override" not in text:
        return None
    key = text.split("'")[1]
    given = next((a for a in arguments if a.lstrip("+~").startswith(f"{key}=")), key)
    known = [name for name, _ in flatten(base())]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see the recipe with --cfg job"
    return f"{given} sets no key of a recipe: {hint}"


def main(run: Callable[[Recipe], int], module: str, arguments: Sequence[str] | None = None, *, on_this_machine: bool = True) -> int:
    """Composes the recipe, validates it and calls `run`; returns the exit status (2: the recipe or the command line is wrong).

    module: the command's name for the processes of a sweep, as in `python -m MODULE`. on_this_machine: the recipe is to run on the ranks that
    were started; False: it is only looked at, so it may ask for as many as it needs.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    store_base()
    status = 0
    failed: list[str] = []
    swept = 0

    def task(config: DictConfig) -> None:
        nonlocal status, swept
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            swept += 1
            if not _sweep_job(module, overrides, config):
                failed.append(" ".join(HydraConfig.get().overrides.task))
            return
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        try:
            status = run(read_recipe(without_missing(values), world_size() if on_this_machine else None))
        except RecipeError as error:  # Hydra would print a line of its own around an exception
            status = _fail(str(error))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed
    # argparse takes positional arguments from one place only, and people write options after overrides too.
    overrides = [a for a in arguments if a.startswith("~") or ("=" in a and not a.startswith("-"))]
    options = [a for a in arguments if a not in overrides]
    if {"-m", "--multirun"} & set(options) and (shared := _shared_directory(overrides)) is not None:
        return _fail(f"{shared} would be the run directory of every job of the sweep: leave it out, each job gets one of its own")
    saved, sys.argv = sys.argv, [f"python -m {module}", *options, *overrides, *QUIET]
    try:
        hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="tiny")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(one_sentence(error, arguments))
    finally:
        sys.argv = saved
    if swept:
        _redact_sweep()
        print(f"sweep: {swept} job{'s' * (swept > 1)}, {swept - len(failed)} finished, {len(failed)} failed")
        for job in failed:
            print(f"  failed: {job}")
        return 1 if failed else 0
    return status


def _redact_sweep() -> None:
    """Hydra writes the overrides of a sweep beside its jobs; as everywhere, without secrets."""
    for path in Path("runs").glob("*-sweep/multirun.yaml"):
        text = path.read_text()
        if (clean := redacted(text)) != text:
            path.write_text(clean)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _shared_directory(overrides: Sequence[str]) -> str | None:
    """A run.dir that does not vary, as it was given."""
    try:
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if o.startswith("run.dir=")])
    except OverrideParseException:
        return None  # Hydra will say so
    return next((str(o.input_line) for o in parsed if not o.is_sweep_override()), None)


def _is_finished(config: DictConfig, run_dir: Path) -> bool:
    """Whether this very run is done. Raises RecipeError where another run lies in its directory."""
    marker, stored = run_dir / "finished.json", run_dir / "recipe.yaml"
    if not (marker.exists() and stored.exists()):
        return False
    values = without_missing(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
    values.setdefault("run", {})["dir"] = str(run_dir)
    recipe = read_recipe(values, None)
    changed_keys(yaml.safe_load(stored.read_text()), recipe)
    return bool(json.loads(marker.read_text()).get("step") == recipe.total_steps)


def _sweep_job(module: str, swept: Sequence[str], config: DictConfig) -> bool:
    """Runs one job of a sweep in a process of its own; True when it finished (now or in an earlier sweep).

    swept: the overrides of the whole sweep; those that vary name the run directory. config: the job's recipe.
    """
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    recipe = str(hydra_config.job.config_name)
    given = [o.split("=", 1)[1].strip("'\"") for o in overrides if o.startswith("run.dir=")]
    if not given:
        # A recipe may name a sweep itself.
        named = [f"{key}={values}" for key, values in (hydra_config.sweeper.get("params") or {}).items()]
        varied = {
            override.key_or_group for override in OverridesParser.create().parse_overrides([*named, *swept]) if override.is_sweep_override()
        }
        label = "__".join(_plain_name(o) for o in overrides if o.split("=", 1)[0] in varied)
        given = [f"runs/{recipe}-sweep/{label or 'job'}"]
        overrides.append(f"run.dir={given[0]}")
    run_dir = Path(given[-1])
    try:
        if module == "train" and _is_finished(config, run_dir):
            print(f"sweep: {run_dir} is finished, skipped")
            return True
    except RecipeError as error:
        _fail(str(error))
        return False
    print(f"sweep: {run_dir}")
    sys.stdout.flush()
    return subprocess.run([sys.executable, "-m", module, "-cn", recipe, *overrides], check=False).returncode == 0


def _plain_name(override: str) -> str:
    """`run.seed=1` -> `seed-1`, fit for a directory."""
    key, value = override.split("=", 1)
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{key.rsplit('.', 1)[-1]}-{value}")
