"""A sweep (`-m key=a,b`): every combination is a process and a run directory of its own, and finished ones are skipped.

Hydra multiplies the overrides out and calls a job for each; its own launcher would run them in this process, one after the other, with whatever
the one before left behind.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from train.observe.redact import redacted
from train.recipe.guard import read_yaml
from train.recipe.load import plain_values, read_recipe
from train.recipe.reading import RecipeError
from train.recipe.resume import changed_keys
from train.refusal import refuse
from train.signals import StopRequested


@dataclass(frozen=True)
class Job:
    """One combination. arguments: of `python -m train`."""

    recipe: str
    run_dir: Path
    arguments: tuple[str, ...]


class Sweep:
    """The jobs of one command line. module: as in `python -m MODULE`. overrides: of the whole sweep; those that vary name the run directories.
    options: for every job. trains: its jobs are runs, which may be finished already. each: called for every
    job with its recipe's values, instead of a process that does it; then there is nothing to sum up."""

    def __init__(
        self,
        module: str,
        overrides: Sequence[str],
        options: Sequence[str] = (),
        *,
        trains: bool = False,
        each: Callable[[Job, dict[str, Any]], None] | None = None,
    ):
        self.module, self.options, self.trains, self.each = module, tuple(options), trains, each
        self.overrides = tuple(overrides)
        self.jobs = 0
        self.failed: list[str] = []

    def run_job(self, config: DictConfig) -> None:
        """Called by Hydra for every combination, with its recipe."""
        self.jobs += 1
        hydra_config = HydraConfig.get()
        recipe, overrides = str(hydra_config.job.config_name), list(hydra_config.overrides.task)
        given = [o.split("=", 1)[1].strip("'\"") for o in overrides if o.startswith("run.dir=")]
        if not given:
            label = "__".join(_plain_name(o) for o in overrides if o.split("=", 1)[0] in self._varied(hydra_config))
            given = [f"runs/{recipe}-sweep/{label or 'job'}"]
            overrides.append(f"run.dir={given[0]}")
        job = Job(recipe, Path(given[-1]), (*self.options, "-cn", recipe, *overrides))
        if not self._train(job, config):
            self.failed.append(" ".join(hydra_config.overrides.task))

    def finish(self) -> int:
        """Sums up; returns the exit status."""
        for path in Path("runs").glob(
            "*-sweep/multirun.yaml"
        ):  # Hydra writes the overrides beside the jobs; as everywhere, without secrets
            text = path.read_text()
            if (clean := redacted(text)) != text:
                path.write_text(clean)
        if self.each is not None:
            return 1 if self.failed else 0
        print(f"sweep: {self.jobs} job{'s' * (self.jobs > 1)}, {self.jobs - len(self.failed)} finished, {len(self.failed)} failed")
        for job in self.failed:
            print(f"  failed: {job}")
        return 1 if self.failed else 0

    def _varied(self, hydra_config: HydraConf) -> set[str]:
        named = [f"{key}={values}" for key, values in (hydra_config.sweeper.get("params") or {}).items()]  # by the recipe itself
        parsed = OverridesParser.create().parse_overrides([*named, *self.overrides])
        return {override.key_or_group for override in parsed if override.is_sweep_override()}

    def _train(self, job: Job, config: DictConfig) -> bool:
        """True when the job finished, now or in an earlier sweep, or was handed on."""
        try:
            if self.trains and _is_finished(config, job.run_dir):
                print(f"sweep: {job.run_dir} is finished, skipped")
                return True
            if self.each is not None:
                self.each(job, _values(config, job.run_dir))
                return True
        except RecipeError as error:
            refuse(str(error))
            return False
        print(f"sweep: {job.run_dir}", flush=True)
        with subprocess.Popen([sys.executable, "-m", self.module, *job.arguments]) as process:
            try:
                return process.wait() == 0
            except StopRequested:  # the sweep ends with its job, which may finish its step and write a checkpoint
                process.send_signal(signal.SIGTERM)
                raise


def shared_directory(overrides: Sequence[str]) -> str | None:
    """A run.dir that does not vary, as it was given."""
    try:
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if o.startswith("run.dir=")])
    except OverrideParseException:
        return None  # Hydra will say so
    return next((str(o.input_line) for o in parsed if not o.is_sweep_override()), None)


def _values(config: DictConfig, run_dir: Path) -> dict[str, Any]:
    values = plain_values(config)
    values.setdefault("run", {})["dir"] = str(run_dir)
    return values


def _is_finished(config: DictConfig, run_dir: Path) -> bool:
    """Whether this very run is done. Raises RecipeError where another run lies in its directory."""
    marker, stored = run_dir / "finished.json", run_dir / "recipe.yaml"
    if not (marker.exists() and stored.exists()):
        return False
    recipe = read_recipe(_values(config, run_dir), None)
    done = int(json.loads(marker.read_text())["step"])
    changed_keys(read_yaml(stored.read_bytes(), str(stored)), recipe, done)
    return done == recipe.total_steps


def _plain_name(override: str) -> str:
    """`run.seed=1` -> `seed-1`, fit for a directory."""
    key, value = override.split("=", 1)
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{key.rsplit('.', 1)[-1]}-{value}")
