"""The front of this room: after every step, whether the run is to go back, and which samples it then passes over.

A step whose loss or gradients are not finite on some rank is taken by none: weights, optimizer state, expert biases stay as they were, and the run
goes on with the next samples. After `monitor.incidents.skips` such steps in a row, or where a spike or unequal replicas ask for it, the run goes
back to the last good checkpoint. It then never reads the samples of those steps again: they belong to the run's state (`BatchPlan.skipped`), in
its checkpoints and under every layout. A run that went back is the run that never saw them.

A checkpoint is good, and only then saved,

    when the step before it was taken (one that is due meanwhile waits; a run that ends or is stopped saves the untouched state),
    when weights, buffers, masters and optimizer state are finite on all ranks,
    and when replicas hold equal bits, where `monitor.replicas.every` is not 0.

Checkpoints later than the one a run goes back to are deleted, and that one is written again with the samples to skip: a run killed at any moment
goes on as if it had not been. After `monitor.incidents.rewinds` times the run stops instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from parallel.replicas import compare_replicas
from train.build import Run
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.ranks import exchange
from train.failures import RunFailed
from train.incidents.diagnosis import diagnose, everything_finite
from train.incidents.report import Incident, write_report
from train.incidents.spikes import SPIKE, Watches
from train.observe import Observers
from train.observe.base import Alert

NUMBERS = ("loss/lm", "loss/mtp_1", "loss/mtp_2", "loss/total", "grad_norm", "learning_rate", "moe/max_violation")
NAMED = 3  # differing tensors in an alert


@dataclass(frozen=True)
class Rewind:
    """The run was taken back to the checkpoint of `step`; state: the loop's, as it was then."""

    step: int
    state: Mapping[str, Any]


class Incidents:
    """Called by every rank alike. streak: steps in a row that were not taken; rewinds: how often the run went back in its life."""

    def __init__(self, run: Run, checkpointer: Checkpointer, observers: Observers) -> None:
        self.run, self.checkpointer, self.observers = run, checkpointer, observers
        self.config, self.replicas = run.recipe.monitor.incidents, run.recipe.monitor.replicas
        routers = [router for chunk in run.chunks for router in chunk.routers()]
        worst = exchange(max((router.experts / router.top_k for router in routers), default=None))
        self.watches = Watches(self.config, max((value for value in worst if value is not None), default=None))
        self.streak = self.rewinds = 0

    def state(self) -> dict[str, Any]:
        skipped = [list(pair) for pair in self.run.plan.skipped]
        return {"streak": self.streak, "rewinds": self.rewinds, "skipped_samples": skipped, "watches": self.watches.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.streak, self.rewinds = int(state.get("streak", 0)), int(state.get("rewinds", 0))
        self.run.plan = self.run.plan.skipping(state.get("skipped_samples", ()))
        self.watches.load_state(state.get("watches", {}))

    def metrics(self) -> dict[str, int]:
        """For logged steps of a run that has passed over samples for good."""
        skipped = sum(end - begin for begin, end in self.run.plan.skipped)
        return {"data/skipped_samples": skipped, "rewinds": self.rewinds} if self.rewinds else {}

    def after_step(self, step: int, metrics: dict[str, float]) -> Rewind | None:
        """What step `step` (from 1) leads to; takes `taken` out of its metrics. Raises RunFailed where nothing more can be done."""
        if not metrics.pop("taken"):
            self.streak += 1
            self.observers.on_skipped(step, metrics["grad_norm"])
            return self._not_finite(step, metrics) if self.streak >= self.config.skips else None
        self.streak = 0
        alerts = self.watches.look(step, metrics)
        for alert in alerts:
            self.observers.on_alert(alert)
        if self.config.on_spike == "rewind":
            spikes = [text for texts in exchange([alert.text for alert in alerts if alert.kind == SPIKE]) for text in texts]
            if spikes:
                return self._spike(step, spikes[0], metrics)
        return self.compare(step) if self.replicas.every and step % self.replicas.every == 0 else None

    def before_save(self, step: int) -> Rewind | None:
        """Whether the state is one to be kept; see above."""
        if not everything_finite(self.run):
            cause = f"weights or optimizer state after step {step} are not finite, so no checkpoint was saved"
            return self._go_back(Incident("state", step, step, cause), step - 1)
        return self.compare(step) if self.replicas.every else None

    def compare(self, step: int) -> Rewind | None:
        """Compares replicas after step `step`."""
        self.run.engine.settle()
        found = compare_replicas(self.run.chunks, self.run.engine.parameter_states(), self.run.layout)
        if not found:
            return None
        more = f"; and {len(found) - NAMED} more tensors" if len(found) > NAMED else ""
        cause = f"replicas differ after step {step}: {'; '.join(mismatch.sentence() for mismatch in found[:NAMED])}{more}"
        incident = Incident("replicas", step, step, cause)
        if self.replicas.on_mismatch == "alert":
            path = self._report(incident, "nothing, as monitor.replicas.on_mismatch=alert says")
            self.observers.on_alert(Alert("replicas", step, f"{cause} ({path})", severe=True))
            return None
        if self.replicas.on_mismatch == "stop":
            self._stop(incident, "monitor.replicas.on_mismatch=stop: look after that rank's machine, and start the same command again")
        return self._go_back(incident, step - 1)

    def _not_finite(self, step: int, metrics: Mapping[str, float]) -> Rewind:
        first = step - self.streak + 1
        finding = diagnose(self.run, step - 1)
        where = "not found again when the step was repeated" if finding is None else finding.sentence()
        several = f"in {self.streak} consecutive steps, the last one step {step}" if self.streak > 1 else f"in step {step}"
        incident = self._incident("not finite", first, step, f"loss or gradients were not finite {several}; first of all {where}", metrics)
        return self._go_back(replace(incident, diagnosed=True, finding=finding), first - 1)

    def _spike(self, step: int, text: str, metrics: Mapping[str, float]) -> Rewind:
        return self._go_back(self._incident(SPIKE, step, step, f"in step {step} {text}", metrics), step - 1)

    def _incident(self, kind: str, first: int, last: int, cause: str, metrics: Mapping[str, float]) -> Incident:
        plan = self.run.plan
        numbers = {key: metrics[key] for key in NUMBERS if key in metrics}
        return Incident(kind, first, last, cause, plan.of_steps(first - 1, last - 1), plan.of_steps(last - 1, last - 1), numbers)

    def _go_back(self, incident: Incident, newest: int) -> Rewind:
        """To the newest checkpoint of at most step `newest`, from where the incident's samples are skipped."""
        if self.rewinds >= self.config.rewinds:
            self._stop(
                incident,
                f"the run has gone back as often as it may (monitor.incidents.rewinds={self.config.rewinds}): start it again with a larger "
                "number, or a new run from an earlier checkpoint with a lower optimizer.learning_rate",
            )
        checkpoint = self.checkpointer.go_back(newest)
        if checkpoint is None:
            self._stop(incident, f"there is no checkpoint of step {newest} or before to go back to: set checkpoint.every")
        rewinds = self.rewinds + 1
        self.load_state(checkpoint.state.get("incidents", {}))
        self.streak, self.rewinds, self.run.plan = 0, rewinds, self.run.plan.skipping(incident.samples)
        ranges = " and ".join(f"{begin} to {end - 1}" for begin, end in incident.samples)
        passing = f", passing over samples {ranges}" if ranges else ""
        path = self._report(incident, f"the run went back to step {checkpoint.step}{passing} (rewind {rewinds} of {self.config.rewinds})")
        said = f"{incident.cause}; going back to the checkpoint of step {checkpoint.step}{passing} ({path})"
        self.observers.on_alert(Alert(incident.kind, incident.last, said, severe=True))
        return Rewind(checkpoint.step, checkpoint.state)

    def _stop(self, incident: Incident, why: str) -> NoReturn:
        self.checkpointer.close()  # all ranks stop here, so the checkpoint under way can still be completed
        path = self._report(incident, f"the run stopped: {why}")
        self.observers.on_alert(Alert(incident.kind, incident.last, f"{incident.cause}; the run stops ({path})", severe=True))
        raise RunFailed(f"{incident.cause}; {why} (report: {path})")

    def _report(self, incident: Incident, decision: str) -> str:
        layout, path = self.run.layout, ""
        if layout.rank == 0:
            path = str(write_report(self.run.run_dir, incident, decision, layout.describe(), self.run.data))
        return exchange(path)[0]
