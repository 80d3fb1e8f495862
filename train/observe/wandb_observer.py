"""Weights & Biases: the same numbers as metrics.jsonl, offline by default, and never a reason for a run to stop.

Every call is guarded: the first failure is reported in one line and the observer is silent from then on. After the
start the calls are made by a thread of their own, so that a service that hangs (a full disk, a lost mount) holds up
the end of a run for `monitor.wandb_timeout_seconds` at most, and its steps not at all. The run id is drawn once and
kept in <run>/wandb_id (a run killed before its first checkpoint keeps it) and in the checkpoint. W&B cannot append to
an offline directory, so a resumed run opens another one below <run>/wandb with the same id and goes on counting in
our steps; `wandb sync --append` joins them. How
busy the machine is (CPU, memory, disk, network, GPUs) is measured every 15 seconds; its name, the environment, the command line, code,
packages and console output are never recorded.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import string
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from train.checkpoint.remote import Location
from train.observe.base import Alert, Metrics, MonitorConfig, Observer, RunInfo
from train.observe.redact import without_secrets
from train.signals import STOPPED

ID_FILE = "wandb_id"
SYSTEM_SECONDS = 15.0  # between measurements of the machine: CPU, memory, disk, GPUs
GRACE_SECONDS = 5.0  # on top of W&B's own timeout, which a service that hangs does not keep
_ID_ALPHABET = string.ascii_lowercase + string.digits


class WandbObserver(Observer):
    """Logs to Weights & Biases below <run>/wandb; `say` receives the one line about a failure."""

    def __init__(self, config: MonitorConfig, say: Callable[[str], None] = print) -> None:
        self.config = config
        self.id: str | None = None
        self._say = say
        self._run: Any = None  # None: not started, failed, or finished
        self._step = -1  # of the row W&B is still collecting
        self._calls: queue.SimpleQueue[tuple[str, Callable[[], None]]] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._exit_code = 0
        self._failure: str | None = None  # found by the worker, said by the next hook

    def on_start(self, run: RunInfo) -> None:
        try:
            self._start(run)
        except Exception as error:  # W&B raises its own, network, file and protocol errors: none may end a run
            self._failure = _sentence("start", error)
        self._report_failure()

    def on_step(self, metrics: Metrics) -> None:
        self._log(dict(metrics))

    def on_evaluation(self, metrics: Metrics) -> None:
        self._log(dict(metrics))

    def on_alert(self, alert: Alert) -> None:
        level = "ERROR" if alert.severe else "WARN"
        self._later("send an alert", lambda run: run.alert(f"{alert.kind} at step {alert.step}", alert.text, level=level))

    def on_checkpoint(self, step: int, path: Location) -> None:
        # W&B writes a row when the next one begins. A run resumed from here begins after this row, so it must be on
        # disk.
        if step == self._step:
            self._later("log a step", lambda run: run.log({}, step=step, commit=True))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        self._later("write the summary", lambda run: run.summary.update(numbers))
        if "signal" in summary:
            self._later("mark the run as stopped", lambda run: run.mark_preempting())
            self._exit_code = STOPPED
        self._finish()

    def on_error(self, error: BaseException) -> None:
        self._exit_code = 1
        self._finish()

    def close(self) -> None:
        self._exit_code = self._exit_code or 1  # neither of the two was called
        self._finish()

    def _finish(self) -> None:
        """Ends the W&B run with the exit code of this one: 0 shows as finished, another as failed, or as preempted after a signal."""
        if self._run is None:
            self._report_failure()
            return
        code = self._exit_code
        self._later("finish", lambda run: run.finish(exit_code=code))
        if self._worker is not None:
            self._calls.put(("stop", _stop))
            self._worker.join(self.config.wandb_timeout_seconds + GRACE_SECONDS)
            if self._worker.is_alive():
                self._failure = "W&B did not answer any more: the run ends without it; metrics.jsonl has every number"
                _abandon_service()
        self._report_failure()
        self._run = None

    def state(self) -> dict[str, Any]:
        return {} if self.id is None else {"id": self.id}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.id = state.get("id", self.id)

    def _start(self, run: RunInfo) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self.id = self.id or self._stored_id(run.run_dir) or "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
        self._store_id(run.run_dir)

        import wandb  # here and not above: it takes half a second, which a run without W&B should not pay

        if self.config.wandb == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key is set up; run `wandb login` once, or set monitor.wandb=offline")
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.config.wandb_timeout_seconds,
            finish_timeout=self.config.wandb_timeout_seconds,
            host="not-recorded",  # left out, W&B would ask the machine
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_meta=True,  # host, user, command line, packages, hardware
            x_save_requirements=False,
            x_disable_machine_info=False,  # true would end the measurements of the machine as well
            x_disable_stats=False,
            x_stats_sampling_interval=SYSTEM_SECONDS,
            x_stats_coreweave_metadata_base_url="http://127.0.0.1:9",  # nobody: else a server is asked where the machine stands
            x_transaction_log_flush_interval=1.0,  # seconds; what a killed run may lose
        )
        recipe = without_secrets(run.recipe)
        parameters = {"parameters": run.parameters, "active_parameters": run.active_parameters}
        self._run = wandb.init(
            mode="online" if self.config.wandb == "online" else "offline",
            dir=str(run.run_dir),  # W&B adds the folder `wandb`
            project=self.config.wandb_project,
            entity=self.config.wandb_entity,
            name=str((run.recipe.get("run") or {}).get("name") or run.run_dir.name),
            id=self.id,
            resume="allow",
            config={**recipe, **parameters},
            settings=settings,
        )
        self._say(f"W&B: {self.config.wandb}, run id {self.id}")

    def _stored_id(self, run_dir: Path) -> str | None:
        path = run_dir / ID_FILE
        stored = path.read_text().strip() if path.is_file() else ""
        return stored if stored and set(stored) <= set(_ID_ALPHABET) else None

    def _store_id(self, run_dir: Path) -> None:
        temporary = run_dir / (ID_FILE + ".new")
        temporary.write_text(f"{self.id}\n")
        os.replace(temporary, run_dir / ID_FILE)

    def _log(self, metrics: dict[str, float | int]) -> None:
        step = self._step = int(metrics["step"])
        self._later("log a step", lambda run: run.log(metrics, step=step))  # W&B merges the rows of one step

    def _later(self, what: str, call: Callable[[Any], Any]) -> None:
        self._report_failure()
        run = self._run
        if run is None:
            return
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="wandb-observer", daemon=True)
            self._worker.start()
        self._calls.put((what, lambda: call(run)))

    def _work(self) -> None:
        while True:
            what, call = self._calls.get()
            if call is _stop:
                return
            try:
                call()
            except Exception as error:
                self._failure = _sentence(what, error)
                return

    def _report_failure(self) -> None:
        if self._failure is not None:
            message, self._failure, self._run = self._failure, None, None
            self._say(message)


def _stop() -> None:
    """The last call in the queue."""


def _sentence(what: str, error: Exception) -> str:
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return f"W&B could not {what} ({type(error).__name__}: {reason}): the run goes on without it; metrics.jsonl has every number"


def _abandon_service() -> None:
    """Ends this process's W&B service, whose exit hook would otherwise wait for it for ever."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end by itself meanwhile
            if child.name().startswith("wandb-core"):
                child.kill()
