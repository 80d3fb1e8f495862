"""One connection to Weights & Biases: from `wandb.init`, through the rows it is given, to `finish` or to the loss of its service.

Nothing here may be trusted to return soon or at all: `train.observe.wandb_observer` calls it from a thread of its own. How
busy the machine is (CPU, memory, disk, network, GPUs) is measured every 15 seconds; its name, the environment, the command line, code,
packages and console output are never recorded.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from train.checkpoint.remote import Location
from train.observe.base import Alert, MonitorConfig, RunInfo
from train.observe.redact import without_secrets
from train.observe.samples import read_samples
from train.observe.wandb_records import RecordReader, files_of, last_step, last_step_written

SYSTEM_SECONDS = 15.0  # between measurements of the machine: CPU, memory, disk, GPUs
CONFIRM_SECONDS = 30.0  # after which a row must be on disk
_SETTLE_SECONDS = 10.0  # a service whose run was killed writes what it has, and ends by itself
SERVICE_FILE = "wandb/service.json"
METRICS = (  # what W&B shows of a metric beside its curve
    ("loss/*", "min,last"),
    ("eval/*", "min,last"),
    ("grad_norm", "max,last"),
    ("tokens_per_second", "mean,last"),
    ("mfu", "mean,last"),
    ("moe/*", "max,last"),
    ("*", "last"),
)


class NoAccount(RuntimeError):
    """There is no key: trying again is of no use."""


class WandbSession:
    """A W&B run that is open. Raises whatever W&B raises, which is any exception.

    written: the last step whose row W&B had when this session began, those of sessions before included.
    """

    def __init__(self, config: MonitorConfig, run: RunInfo, run_id: str) -> None:
        import wandb  # here and not above: it takes half a second, which a run without W&B should not pay

        self._run_dir, self._id, self._online = run.run_dir, run_id, config.wandb == "online"
        if self._online and not wandb.login(prompt=False, verify=False):
            raise NoAccount("no API key is set up; run `wandb login` once, or set monitor.wandb=offline")
        _end_service_of_before(run.run_dir)
        self.written = last_step_written(run.run_dir, run_id)
        self._sent = 0
        self._unconfirmed: float | None = None  # since when a row was sent and not seen on disk
        self._confirmed = 0
        self._reader: RecordReader | None = None
        self._service: psutil.Process | None = None
        _wait_for_a_new_name(run.run_dir, run_id)
        self._run: Any = wandb.init(
            mode="online" if self._online else "offline",
            dir=str(run.run_dir),  # W&B adds the folder `wandb`
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=str((run.recipe.get("run") or {}).get("name") or run.run_dir.name),
            id=run_id,
            group=run_id if run.parent is None else run.parent.wandb_id,  # a run and its branches
            job_type="train" if run.parent is None else "branch",
            resume="allow",
            reinit="create_new",
            config=_config(run),
            settings=_settings(config),
        )
        self._find_service()
        if self._online:  # the server knows what it has; what lies here may never have been sent
            self.written = max(0, int(self._run.starting_step) - 1)
        files = files_of(run.run_dir, run_id)
        self._reader = RecordReader(files[-1]) if files else None
        self._run.define_metric("step", hidden=True)
        for name, summary in METRICS:
            self._run.define_metric(name, step_metric="step", summary=summary)

    def log(self, row: Mapping[str, Any], pictures: Mapping[str, Path] | None = None, page: Path | None = None) -> None:
        """Sends a row that will not change any more; pictures (PNG) and a page (HTML) are shown with it, as media of its step, and
        texts that the model made at this step as a table."""
        import wandb

        media: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in (pictures or {}).items()}
        if page is not None:
            media["report/page"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
        if "seconds/samples" in row:
            texts = [sample for sample in read_samples(self._run_dir) if sample["step"] == row["step"]]
            columns: list[str | int] = ["step", "prompt", "text", "ended"]
            media["samples"] = wandb.Table(columns=columns, data=[[text[str(column)] for column in columns] for text in texts])
        self._run.log({**row, **media}, step=int(row["step"]), commit=True)
        self._sent = int(row["step"])
        if self._unconfirmed is None:
            self._unconfirmed = time.monotonic()

    def alert(self, alert: Alert) -> None:
        self._run.alert(f"{alert.kind} at step {alert.step}", alert.text, level="ERROR" if alert.severe else "WARN")

    def alive(self) -> bool:
        """Whether the service's process is there; true where it is not ours to see."""
        return self._service is None or (self._service.is_running() and self._service.status() != psutil.STATUS_ZOMBIE)

    def check(self) -> None:
        """Raises OSError where the service has ended, or has not written for half a minute what it was sent (a full disk: it says nothing)."""
        if not self.alive():
            raise OSError("its service has ended")
        if self._unconfirmed is None or not self._confirm():
            return
        if time.monotonic() - self._unconfirmed > CONFIRM_SECONDS:
            raise OSError(f"the rows behind step {self._confirmed or self.written} did not reach its file, the disk may be full")

    def _confirm(self) -> bool:
        """Whether rows are still on their way to the disk."""
        if self._reader is not None and (seen := last_step(self._reader)) > self._confirmed:
            self._confirmed, self._unconfirmed = seen, time.monotonic()
        if self._confirmed >= self._sent or self._reader is None:
            self._unconfirmed = None
        return self._unconfirmed is not None

    def confirmed(self, seconds: float) -> bool:
        """Whether every row is on disk; the service, a process of its own, may still be writing when it says it has finished."""
        until = time.monotonic() + seconds
        while self._unconfirmed is not None and self._confirm() and time.monotonic() < until:
            time.sleep(0.05)
        return self._unconfirmed is None

    @property
    def lasting(self) -> int:
        """The last step whose row is on disk."""
        return max(self._confirmed, self.written)

    def summarise(self, numbers: Mapping[str, float | int]) -> None:
        self._run.summary.update(dict(numbers))

    def point_to(self, checkpoint: Location, facts: Mapping[str, Any]) -> None:
        """An artifact that says where a checkpoint lies: no byte of it is read or sent."""
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._id}", type="checkpoint", metadata=dict(facts))
        where = checkpoint.absolute().as_uri() if isinstance(checkpoint, Path) else str(checkpoint)
        artifact.add_reference(where, checksum=False)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{facts['step']}"])

    def preempted(self) -> None:
        self._run.mark_preempting()

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def _find_service(self) -> None:
        """The process that writes for W&B, by which a later start finds one that outlived its run."""
        self._service = next(iter(_services()), None)
        if self._service is not None:
            facts = {"pid": self._service.pid, "created": self._service.create_time()}
            path = self._run_dir / SERVICE_FILE
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(facts) + "\n")


def abandon_services() -> None:
    """Ends this process's W&B service, for whom everything else, its exit hook included, would wait; W&B can be started anew afterwards."""
    for service in _services():
        with contextlib.suppress(psutil.Error):  # it may end by itself meanwhile
            service.kill()
            service.wait(5)
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown(1)


def _services() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                found.append(child)
    return found


def _end_service_of_before(run_dir: Path) -> None:
    """A service that outlived its killed run is given time to write what it has; then it is ended, or two would write one run."""
    path = run_dir / SERVICE_FILE
    try:
        facts = json.loads(path.read_text())
        process = psutil.Process(int(facts["pid"]))
        if abs(process.create_time() - float(facts["created"])) > 0.01 or process in _services():
            return
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return  # none was left, or it has ended
    with contextlib.suppress(psutil.Error):
        try:
            process.wait(_SETTLE_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(5)


def _wait_for_a_new_name(run_dir: Path, run_id: str) -> None:
    """W&B names its directories by the second: a second one of the same second would take the place of the first."""
    while any(datetime.now().strftime("-%Y%m%d_%H%M%S-") in path.parent.name for path in files_of(run_dir, run_id)):
        time.sleep(0.05)


def _config(run: RunInfo) -> dict[str, Any]:
    counted = {"parameters": run.parameters, "active_parameters": run.active_parameters}
    config = {**run.recipe, **counted, **run.facts, "precision_table": run.precision_table}
    if run.parent is not None:
        config["parent"] = {"wandb_id": run.parent.wandb_id, "step": run.parent.step, "changes": dict(run.parent.changes)}
    return without_secrets(config)


def _settings(config: MonitorConfig) -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        init_timeout=config.wandb_timeout_seconds,
        finish_timeout=config.wandb_timeout_seconds,
        host="not-recorded",  # left out, W&B would ask the machine
        program="train",  # and note the path of the script
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
