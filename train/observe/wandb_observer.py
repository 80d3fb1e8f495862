"""Weights & Biases: the rows of metrics.jsonl, each once, as one unbroken run, offline by default, and never a reason for a run to wait or stop.

A thread of its own opens W&B and sends it the rows of metrics.jsonl as they become final: the file is the queue, so nothing piles up in memory
however slow W&B is, and nothing is lost however long it is away. What W&B has is read back whenever it is opened (offline from its own
.wandb files, online from the server), and the rows behind that follow: after a restart from an older checkpoint no step is written twice, and
what an outage, a full disk or a killed service kept from W&B is made up for, in this process or at the next start of the run.

The run id is drawn once and kept in <run>/wandb_id (a run killed before its first checkpoint keeps it) and in the checkpoint. W&B cannot append
to an offline directory, so every opening makes another one below <run>/wandb with the same id; `wandb sync` sends them in order, into one run.

W&B cannot take back a row. After a rewind (`on_rewind`) it keeps the rows of the steps that were taken back, with an alert, and goes on behind
them; metrics.jsonl has the steps as they were taken again.
"""

from __future__ import annotations

import collections
import os
import secrets
import string
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from train.checkpoint.remote import Location
from train.observe.base import Alert, Metrics, MonitorConfig, Observer, RunInfo
from train.observe.metrics_tail import MetricsTail
from train.observe.redact import redacted
from train.observe.sample_settings import Sample
from train.observe.wandb_session import NoAccount, WandbSession, abandon_services
from train.signals import STOPPED

ID_FILE = "wandb_id"
GRACE_SECONDS = 5.0  # on top of W&B's own timeout, which a service that hangs does not keep
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 2.0, 600.0  # between two openings; doubled each time
LOOK_SECONDS = 10.0  # between looks at whether the service lives and writes
_MOST_WAITING = 200  # alerts and artifacts kept for a W&B that is away; incidents.jsonl has every alert
_ID_ALPHABET = string.ascii_lowercase + string.digits

Call = Callable[[WandbSession], None]


class WandbObserver(Observer):
    """Logs to Weights & Biases below <run>/wandb.

    say: receives the few lines for a person. draw_report: draws the report of a run's directory and returns its page; asked where
    `monitor.wandb_report` is set.
    """

    def __init__(
        self, config: MonitorConfig, say: Callable[[str], None] = print, draw_report: Callable[[Path], Path] | None = None
    ) -> None:
        self.config = config
        self.id: str | None = None
        self._say = say
        self._draw_report = draw_report
        self._run: RunInfo | None = None
        self._tail: MetricsTail | None = None
        self._page: Path | None = None
        self._summary: dict[str, float | int] = {}
        self._exit_code = 0
        self._finished = self._stopped = False
        self._waiting: collections.deque[tuple[str, Call]] = collections.deque(maxlen=_MOST_WAITING)
        self._lines: collections.deque[str] = collections.deque(maxlen=_MOST_WAITING)  # of the worker, said by the next hook
        self._worker: threading.Thread | None = None
        self._wake, self._ending = threading.Event(), threading.Event()
        self._busy_since: float | None = None  # the worker is inside a call to W&B
        self._complaint = ""  # the last one, which is not said again every ten minutes

    # -- hooks, on the thread of the run: none calls W&B ----------------------------------------------------------------------------------

    def on_start(self, run: RunInfo) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._run = run
        self.id = self.id or self._stored_id(run.run_dir) or "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
        self._store_id(run.run_dir)
        try:
            import wandb  # noqa: F401  # here: half a second, which a run without W&B should not pay; not in the worker: two threads that import collide
        except Exception as error:
            self._say(_sentence("start", error, "the run goes on without it"))
            return
        self._worker = threading.Thread(target=self._work, args=(run, self.id), name="wandb-observer", daemon=True)
        self._worker.start()

    def on_step(self, metrics: Metrics) -> None:
        self._nudge()

    def on_evaluation(self, metrics: Metrics) -> None:
        self._nudge()

    def on_samples(self, metrics: Metrics, samples: Sequence[Sample]) -> None:
        self._nudge()

    def on_alert(self, alert: Alert) -> None:
        self._later("send an alert", lambda session: session.alert(alert))

    def on_rewind(self, step: int, to: int) -> None:
        if self._tail is not None:
            self._tail.rewind()
        text = (
            f"the run went back from step {step} to its checkpoint of step {to}; the rows between them show the steps as they were taken first, "
            "metrics.jsonl as they were taken again"
        )
        self.on_alert(Alert("rewind", step, text, severe=True))

    def on_checkpoint(self, step: int, path: Location) -> None:
        if self.config.wandb_artifacts:
            self._later("name a checkpoint", lambda session: session.point_to(path, {"step": step}))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._summary = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        self._finished = "stopped" not in summary
        if "signal" in summary:
            self._stopped, self._exit_code = True, STOPPED
        if self._finished and self.config.wandb_report and self._draw_report is not None and self._run is not None:
            self._page = self._draw_report(self._run.run_dir)
        self._finish()

    def on_error(self, error: BaseException) -> None:
        self._exit_code = 1
        self._finish()

    def close(self) -> None:
        self._exit_code = self._exit_code or 1  # neither of the two was called
        self._finish()

    def state(self) -> dict[str, Any]:
        return {} if self.id is None else {"id": self.id}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.id = state.get("id", self.id)

    def _later(self, what: str, call: Call) -> None:
        self._waiting.append((what, call))
        self._nudge()

    def _nudge(self) -> None:
        self._wake.set()
        self._speak()
        since = self._busy_since
        if since is not None and time.monotonic() - since > self.config.wandb_timeout_seconds + GRACE_SECONDS:
            self._busy_since = None
            abandon_services()  # the call that hangs fails, and the worker opens W&B anew

    def _speak(self) -> None:
        while self._lines:
            self._say(self._lines.popleft())

    def _finish(self) -> None:
        """Ends the W&B run with the exit code of this one: 0 shows as finished, another as failed, or as preempted after a signal."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._ending.set()
            self._wake.set()
            worker.join(self.config.wandb_timeout_seconds + GRACE_SECONDS)
            if worker.is_alive():
                self._lines.append("W&B did not answer any more: the run ends without it; metrics.jsonl has every number")
                abandon_services()
        self._speak()

    # -- the worker -----------------------------------------------------------------------------------------------------------------------

    def _work(self, run: RunInfo, run_id: str) -> None:
        wait, opened, ended = FIRST_RETRY_SECONDS, 0, False
        while True:
            session: WandbSession | None = None
            began = time.monotonic()
            try:
                self._busy_since = began
                session = WandbSession(self.config, run, run_id)
                self._busy_since = None
                opened += 1
                self._complaint = ""
                self._lines.append(_opened_line(self.config.wandb, run_id, opened, session.written))
                self._serve(session, run)
                return
            except NoAccount as error:
                self._lines.append(_sentence("start", error, "the run goes on without it"))
                return
            except Exception as error:  # W&B raises its own, network, file and protocol errors: none may end a run
                self._busy_since = None
                self._complain(_sentence("start" if session is None else "go on", error, "the run goes on, and W&B is tried again"))
                abandon_services()
            if self._ending.is_set():
                if session is None or ended:
                    return
                ended = True  # one more time, for the last rows
            if time.monotonic() - began > LAST_RETRY_SECONDS:  # it worked for long
                wait = FIRST_RETRY_SECONDS
            self._ending.wait(wait)
            wait = min(2 * wait, LAST_RETRY_SECONDS)

    def _serve(self, session: WandbSession, run: RunInfo) -> None:
        """Sends what there is until the run ends."""
        tail = self._tail = MetricsTail(run.run_dir, session.written)
        while not self._ending.is_set():
            self._wake.clear()
            for row in tail.rows():
                self._timed(partial(session.log, row))
            self._deliver(session)
            session.check()
            self._wake.wait(LOOK_SECONDS)
        self._deliver(session)
        self._send_last(session, tail, run)
        if self._stopped:
            session.preempted()
        session.summarise(self._summary)
        session.finish(self._exit_code)
        if not session.confirmed(GRACE_SECONDS):
            self._lines.append(
                f"W&B has the rows up to step {session.lasting} only, as its files could not be written: the next start of the run adds the rest"
            )

    def _send_last(self, session: WandbSession, tail: MetricsTail, run: RunInfo) -> None:
        """The rows that are left; the last one stays back where its evaluation is still owed, as W&B could not add that to it later."""
        before: Mapping[str, Any] | None = None
        for row in tail.rows(last=True):
            if before is not None:
                session.log(before)
            before = row
        if before is None or not (self._finished or _is_whole(before, run)):
            return
        folder = run.run_dir / "report"
        pictures = sorted(folder.glob("*.png")) if self._page is not None else [folder / "loss.png"]
        shown = {f"report/{path.stem}": path for path in pictures if path.is_file()} if self._finished else {}
        session.log(before, shown, self._page)

    def _deliver(self, session: WandbSession) -> None:
        """Alerts and artifacts; one that W&B refuses is said and left out, one that meets a dead service waits for the next."""
        while self._waiting:
            what, call = self._waiting.popleft()
            try:
                self._timed(partial(call, session))
            except Exception as error:
                if not session.alive():
                    self._waiting.appendleft((what, call))
                    raise
                self._lines.append(_sentence(what, error, "the run goes on"))

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._complaint = text
            self._lines.append(text)

    def _timed(self, call: Callable[[], None]) -> None:
        self._busy_since = time.monotonic()
        try:
            call()
        finally:
            self._busy_since = None

    def _stored_id(self, run_dir: Path) -> str | None:
        path = run_dir / ID_FILE
        stored = path.read_text().strip() if path.is_file() else ""
        return stored if stored and set(stored) <= set(_ID_ALPHABET) else None

    def _store_id(self, run_dir: Path) -> None:
        temporary = run_dir / (ID_FILE + ".new")
        temporary.write_text(f"{self.id}\n")
        os.replace(temporary, run_dir / ID_FILE)


def _opened_line(mode: str, run_id: str, opened: int, written: int) -> str:
    again = " again" if opened > 1 else ""
    behind = f", goes on behind step {written}" if written else ""
    return f"W&B: {mode}{again}, run id {run_id}{behind}"


def _is_whole(row: Mapping[str, Any], run: RunInfo) -> bool:
    """Whether nothing can be added to the last row of a run that goes on later."""
    every = int((run.recipe.get("train") or {}).get("eval_every") or 0)
    return "seconds/evaluation" in row or not (row["step"] == run.total_steps or (every and row["step"] % every == 0))


def _sentence(what: str, error: Exception, consequence: str) -> str:
    reason = (redacted(str(error)).strip() or "no reason given").splitlines()[0]
    return f"W&B could not {what} ({type(error).__name__}: {reason}): {consequence}; metrics.jsonl has every number"
