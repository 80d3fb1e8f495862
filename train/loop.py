"""The run from outside: recipe -> layout -> run directory -> data, model, engine -> training, see `train.training`.

However a run ends (see `train.signals` for what it exits with), observers are closed, the directory is given back, and the process groups are
left.
"""

import sys
from pathlib import Path

from data.documents import DataError
from parallel import groups
from parallel.layout import Layout
from parallel.meeting import NotMet
from train.build import build
from train.checkpoint.manifest import CheckpointError
from train.failures import Failures, failing_together
from train.hang import HangWatch
from train.observe import Observers, open_observers
from train.recipe.reading import RecipeError
from train.recipe.tree import Recipe
from train.refusal import leave_for_launcher
from train.report.picture import draw_losses_of, draw_report_of
from train.run_directory import check_source, opened
from train.signals import StopSignals
from train.step_failure import Place, sentence
from train.threads import cpu_threads
from train.training import Training


def run(recipe: Recipe) -> int:
    """Trains, or goes on training, the run of this recipe; returns the exit status (see `train.signals`).

    Raises RecipeError for what is the recipe's fault, and an error of the code as it was raised, after a sentence that says where. With several
    ranks the first that fails speaks, and all return its status.
    """
    with StopSignals() as signals, cpu_threads(recipe.train.threads):
        try:
            layout = groups.initialize(recipe.parallel, recipe.run.seed)
            with failing_together(layout.rank, layout.world_size) as failures:
                place = Place()
                try:
                    with HangWatch(failures, Path(recipe.run_dir), place, recipe.parallel.timeout_minutes):
                        failures.status = _run(recipe, layout, signals, failures, place)
                except BaseException as error:
                    failures.settle(error)  # before the others lose the connection
                    raise
                finally:
                    groups.shutdown()
            return failures.status
        except (DataError, CheckpointError) as error:
            raise RecipeError(str(error)) from None
        except NotMet as error:
            leave_for_launcher(f"error: {error}")
            if error.told_here:
                print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        finally:
            groups.shutdown()


def _run(recipe: Recipe, layout: Layout, signals: StopSignals, failures: Failures, place: Place) -> int:
    with opened(recipe, layout.rank) as directory:
        if directory.finished is not None:
            if layout.rank == 0:
                loss = directory.finished.get("eval/loss")
                print(f"{directory.path} is finished: validation loss {loss}; choose another run.dir for a new run")
            return 0
        check_source(recipe)
        recipe = directory.recipe
        run = build(recipe, layout)
        observers = open_observers(recipe.monitor, draw_losses_of, draw_report_of) if layout.rank == 0 else Observers(())
        try:
            return Training(run, directory, observers, signals, place).train()
        except BaseException as error:
            where = sentence(error, place, layout.rank, layout.world_size, run.chunks)
            observers.on_error(failures.settle(error, where))
            raise
        finally:
            observers.close()
            failures.meet()
            run.engine.close()
