"""Weights & Biases: complete, continuous, without secrets, and never a reason for a run to stop."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runbook import told
from tests.train.observe.examples import RECIPE, metrics_of, run_info
from train.observe import MonitorConfig, Observers, wandb_observer, wandb_session
from train.observe.base import Alert, Parent
from train.observe.metrics import MetricsFile, read_metrics
from train.observe.metrics_tail import MetricsTail
from train.observe.redact import REMOVED
from train.observe.wandb_observer import WandbObserver
from train.observe.wandb_records import RecordReader, files_of, last_step_written, row_of

PATIENT = MonitorConfig(wandb_timeout_seconds=120)


def without_service() -> dict[str, str]:
    """The environment less the variable by which a child of a process that uses W&B would share its service."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


class Watched:
    """metrics.jsonl and W&B of a run, as the loop drives them, from a start after `step` on."""

    def __init__(self, run_dir: Path, step: int = 0, config: MonitorConfig = PATIENT, **info: Any) -> None:
        self.said: list[str] = []
        self.run_dir, self.step, self.slowest = run_dir, step, 0.0
        self.wandb = WandbObserver(config, self.said.append)
        self.observers = Observers([MetricsFile(), self.wandb], self.said.append)
        self.observers.on_start(run_info(run_dir, step=step, **info))

    def train(self, to: int) -> None:
        while self.step < to:
            self.step += 1
            begin = time.perf_counter()
            self.observers.on_step(metrics_of(self.step))
            if self.step % 4 == 0:
                self.observers.on_evaluation(evaluation_of(self.step))
            self.slowest = max(self.slowest, time.perf_counter() - begin)

    def end(self, **summary: Any) -> None:
        self.observers.on_end({"step": self.step, **summary})
        self.observers.close()

    def wait(self, step: int) -> None:
        """Until W&B has written the row of this step."""
        assert self.wandb.id is not None
        waiting(lambda: last_step_written(self.run_dir, str(self.wandb.id)) >= step)


def waiting(until: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def evaluation_of(step: int) -> dict[str, float | int]:
    return {"step": step, "tokens": step * 2048, "eval/loss": 4.0 / step, "seconds/evaluation": 0.25}


def written(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of all starts, oldest first."""
    run_id = (run_dir / "wandb_id").read_text().strip()
    rows = [row_of(record) for path in files_of(run_dir, run_id) for record in RecordReader(path).new()]
    return [row for row in rows if row is not None]


def check_one_line(run_dir: Path) -> None:
    """W&B has what metrics.jsonl has: each step once, in order, with the same values."""
    rows, truth = written(run_dir), read_metrics(run_dir)
    assert [row["_step"] for row in rows] == [row["step"] for row in truth]
    for row, expected in zip(rows, truth, strict=True):
        assert {key: row.get(key) for key in expected} == expected


def services() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.name().startswith("wandb-core")]


def wandb_run(directory: Path) -> Any:
    records = RecordReader(next(directory.glob("*.wandb"))).new()
    return next(record.run for record in records if record.WhichOneof("record_type") == "run")


def test_wandb_offline_is_complete_continuous_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t-value-of-the-environment"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 8 + "f" * 32)
    monkeypatch.setenv("SOME_PASSWORD", secret)
    monkeypatch.setattr(sys, "argv", ["train", f"hub.password={secret}"])
    recipe = {**RECIPE, "hub": {"password": secret, "url": f"https://u:{secret}@h/"}}

    facts = {"layout": {"ranks": 2}, "plan": {"flops": 1e9}, "code": {"version": "1"}}
    first = Watched(tmp_path, recipe=recipe, facts=facts)
    first.train(5)
    state = json.loads(json.dumps(first.observers.state()))
    first.end(stopped="a signal", signal="SIGTERM")

    second = Watched(tmp_path, 5, recipe=recipe)
    second.observers.load_state(state)
    second.train(10)
    second.end()

    directories = sorted(path for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(directories) == 2
    assert {wandb_run(directory).run_id for directory in directories} == {first.wandb.id} == {second.wandb.id}
    check_one_line(tmp_path)
    config = {item.key: json.loads(item.value_json) for item in wandb_run(directories[0]).config.update}
    assert config["model"] == RECIPE["model"] and config["run"] == RECIPE["run"]
    assert config["precision"] == RECIPE["precision"] and config["parameters"] == 1_234_567
    assert {key: config[key] for key in facts} == facts
    assert config["hub"] == {"password": REMOVED, "url": f"https://{REMOVED}@h/"}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content, path
            assert os.environ["WANDB_API_KEY"].encode() not in content, path
            assert path.name not in ("wandb-metadata.json", "requirements.txt", "output.log")
    assert all(wandb_run(directory).host == "not-recorded" for directory in directories)


def test_wandb_measures_the_machine_and_never_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_session, "SYSTEM_SECONDS", 0.2)
    monkeypatch.setenv("NIBBLE_TEST_VARIABLE", "a-value-of-the-environment")
    monkeypatch.setattr(sys, "argv", ["train", "an.argument=of-the-command-line"])
    watched = Watched(tmp_path)
    watched.train(2)
    watched.wait(1)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    measured: set[str] = set()
    while not {"cpu", "memory_percent"} <= measured and time.monotonic() < deadline:
        time.sleep(0.2)
        measured = {
            item.key for record in RecordReader(file).new() if record.WhichOneof("record_type") == "stats" for item in record.stats.item
        }
    watched.observers.on_error(RuntimeError("expert 7 is on fire"))
    watched.observers.close()
    assert {"cpu", "memory_percent", "proc.memory.rssMB"} <= measured
    waiting(lambda: bool([r for r in RecordReader(file).new() if r.WhichOneof("record_type") == "exit"]))
    assert [r.exit.exit_code for r in RecordReader(file).new() if r.WhichOneof("record_type") == "exit"] == [1]  # failed, not finished
    kinds = {record.WhichOneof("record_type") for record in RecordReader(file).new()}
    assert kinds <= {"header", "run", "telemetry", "metric", "history", "summary", "stats", "exit", "footer"}
    names = [socket.gethostname(), "a-value-of-the-environment", "of-the-command-line", sys.executable, str(Path(__file__).parents[3])]
    for name in (name.encode() for name in names if len(name) > 3):
        assert name not in file.read_bytes(), name


def test_a_killed_run_goes_on_as_one_line(tmp_path: Path) -> None:
    """Twice killed, with its service left behind, behind a checkpoint and before any."""
    script = (
        "import sys, time; from pathlib import Path; from tests.train.observe.test_wandb import Watched\n"
        "watched = Watched(Path(sys.argv[1]), int(sys.argv[2])); watched.train(int(sys.argv[3]))\n"
        "watched.wait(int(sys.argv[3]) - 1); print('ready', flush=True); time.sleep(60)\n"
    )
    for step, to in ((0, 9), (4, 13)):
        command = [sys.executable, "-c", script, str(tmp_path), str(step), str(to)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=without_service(), cwd=Path(__file__).parents[3])
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
    killed_id = (tmp_path / "wandb_id").read_text().strip()
    last = Watched(tmp_path, 6, total=20)
    last.train(20)
    last.end()
    assert last.wandb.id == killed_id and len(killed_id) == 8
    check_one_line(tmp_path)
    assert len(files_of(tmp_path, killed_id)) == 3


def test_what_was_torn_off_is_written_again(tmp_path: Path) -> None:
    first = Watched(tmp_path)
    first.train(9)
    first.end(stopped="a signal", signal="SIGTERM")
    (file,) = files_of(tmp_path, str(first.wandb.id))
    with file.open("r+b") as torn:
        torn.truncate(file.stat().st_size * 2 // 3)  # in the middle of a record
    kept = len(written(tmp_path))
    assert 0 < kept < 9
    second = Watched(tmp_path, 8)
    second.train(10)
    second.end()
    check_one_line(tmp_path)
    assert f"behind step {kept}" in second.said[0]


def test_a_step_whose_evaluation_is_owed_is_written_with_it(tmp_path: Path) -> None:
    recipe = {**RECIPE, "train": {"eval_every": 4}}
    first = Watched(tmp_path, recipe=recipe)
    first.train(3)
    first.observers.on_step(metrics_of(4))
    first.end(stopped="a signal", signal="SIGTERM")  # before the evaluation
    assert [row["_step"] for row in written(tmp_path)] == [1, 2, 3]
    second = Watched(tmp_path, 4, recipe=recipe)
    second.observers.on_evaluation(evaluation_of(4))
    second.train(10)
    second.end()
    check_one_line(tmp_path)


def test_after_a_rewind_no_step_is_written_twice(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.train(7)
    watched.wait(6)
    watched.observers.on_rewind(7, 4)
    for step in (5, 6, 7, 8):
        watched.observers.on_step(metrics_of(step, loss=1.0))
    watched.step = 8
    watched.train(10)
    watched.end()
    rows = written(tmp_path)
    assert [row["_step"] for row in rows] == list(range(1, 11))
    assert [row["loss/lm"] for row in rows[4:8]] == [1.0, 5 / 6, 1.0, 1.0]  # 6 was sent before; 7 waited for the next


def test_a_file_that_is_shortened_is_read_again(tmp_path: Path) -> None:
    """Also where the reader stands behind what is left, and the rows that follow are shorter."""
    file, tail = MetricsFile(), MetricsTail(tmp_path, 0)
    file.on_start(run_info(tmp_path))
    for step in range(1, 8):
        file.on_step(metrics_of(step))
    assert [row["step"] for row in tail.rows()] == [1, 2, 3, 4, 5, 6]
    file.on_rewind(7, 3)
    tail.rewind()
    for step in range(4, 10):
        file.on_step({"step": step})
    assert list(tail.rows()) == [{"step": 7}, {"step": 8}] and list(tail.rows(last=True)) == [{"step": 9}]


def test_wandb_failures_are_said_once_and_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb_observer, "FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    init, calls = wandb.init, []

    def broken(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) < 4:
            raise OSError(f"disk quota exceeded, and the key is {'k' * 40}\nmore detail")
        return init(*arguments, **named)

    monkeypatch.setattr(wandb, "init", broken)
    watched = Watched(tmp_path)
    watched.train(8)
    watched.wait(7)
    watched.train(10)
    watched.end()
    assert len(watched.said) == 2
    assert "could not start (OSError: disk quota exceeded, and the key is (removed)): the run goes on, and W&B is tried" in watched.said[0]
    assert watched.said[1] == f"W&B: offline, run id {watched.wandb.id}"
    check_one_line(tmp_path)


def test_a_killed_service_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_observer, "FIRST_RETRY_SECONDS", 0.05)
    watched = Watched(tmp_path, total=40)
    watched.train(10)
    watched.wait(9)
    for service in services():
        service.kill()
    watched.train(30)
    watched.wait(29)
    watched.train(40)
    watched.end()
    check_one_line(tmp_path)
    assert watched.slowest < 0.2
    assert len(files_of(tmp_path, str(watched.wandb.id))) == 2
    assert "could not go on" in watched.said[1] and "again, run id" in watched.said[2] and len(watched.said) == 3
    told("W&B's service was killed", "\n".join(watched.said))


def test_a_full_disk_of_its_own_is_noticed_and_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B says nothing when it cannot write: its service may write no further byte from step 10 on, until another is started."""
    monkeypatch.setattr(wandb_observer, "FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(wandb_observer, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(wandb_session, "CONFIRM_SECONDS", 3.0)
    watched = Watched(tmp_path, total=40)
    watched.train(10)
    watched.wait(9)
    (file,) = files_of(tmp_path, str(watched.wandb.id))
    for service in services():
        size = file.stat().st_size
        service.rlimit(psutil.RLIMIT_FSIZE, (size, size))
    watched.train(30)
    watched.wait(29)
    watched.train(40)
    watched.end()
    check_one_line(tmp_path)
    assert watched.slowest < 0.2
    told("The disk W&B writes to is full", "\n".join(watched.said), "did not reach its file")


@pytest.mark.slow
def test_a_disk_that_stays_full_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next start adds the rest."""
    monkeypatch.setattr(wandb_observer, "FIRST_RETRY_SECONDS", 600.0)
    monkeypatch.setattr(wandb_observer, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(wandb_session, "CONFIRM_SECONDS", 3.0)
    watched = Watched(tmp_path, total=40)
    watched.train(10)
    watched.wait(9)
    (file,) = files_of(tmp_path, str(watched.wandb.id))
    for service in services():
        size = file.stat().st_size
        service.rlimit(psutil.RLIMIT_FSIZE, (size, psutil.RLIM_INFINITY))
    watched.train(30)
    watched.end()
    told("The disk W&B writes to is full", "\n".join(watched.said), "has the rows up to step")
    for service in services():
        service.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    again = Watched(tmp_path, step=30, total=40)
    again.train(40)
    again.wait(39)
    again.end()
    check_one_line(tmp_path)


def test_a_branch_stands_beside_its_parent(tmp_path: Path) -> None:
    parent = Watched(tmp_path / "parent")
    parent.train(4)
    parent.end(stopped="run.stop_after=4")
    changes = {"precision.default": ["nvfp4", "bf16"]}
    branch = Watched(tmp_path / "branch", 4, parent=Parent("/runs/parent", "/runs/parent/checkpoints/4", 4, parent.wandb.id, changes))
    branch.train(10)
    branch.end()
    (first,), (second,) = ((wandb_run(path) for path in (tmp_path / name / "wandb").glob("offline-run-*")) for name in ("parent", "branch"))
    assert first.run_id != second.run_id and first.run_group == second.run_group == first.run_id
    assert (first.job_type, second.job_type) == ("train", "branch")
    config = {item.key: json.loads(item.value_json) for item in second.config.update}
    assert config["parent"] == {"wandb_id": first.run_id, "step": 4, "changes": changes}
    check_one_line(tmp_path / "branch")


def test_checkpoints_are_named_and_not_read(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints/step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"secret weights")
    watched = Watched(tmp_path, config=MonitorConfig(wandb_timeout_seconds=120, wandb_artifacts=True))
    watched.train(2)
    watched.observers.on_checkpoint(2, checkpoint)
    watched.observers.on_alert(Alert("spike", 2, "loss/lm is 9 standard deviations above its mean", severe=True))
    watched.train(10)
    watched.end()
    (file,) = files_of(tmp_path, str(watched.wandb.id))
    records = list(RecordReader(file).new())
    (artifact,) = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    (alert,) = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert alert.title == "spike at step 2" and alert.level == "ERROR"
    assert set(artifact.aliases) == {"latest", "step-2"} and json.loads(artifact.metadata) == {"step": 2}
    assert [entry.ref for entry in artifact.manifest.contents] == [f"{checkpoint.as_uri()}/weights"]
    assert not any(b"secret weights" in path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())


def test_wandb_service_that_hangs_delays_only_the_end(tmp_path: Path) -> None:
    script = (
        "import psutil, sys, time; from pathlib import Path; from train.observe import MonitorConfig, RunInfo\n"
        "from train.observe import wandb_observer; wandb_observer.GRACE_SECONDS = 0.5\n"
        "from tests.train.observe.test_wandb import Watched\n"
        "w = Watched(Path(sys.argv[1]), config=MonitorConfig(wandb_timeout_seconds=2)); o, said = w.observers, w.said\n"
        "w.train(2); w.wait(1); o.on_step({'step': 3}); said.clear()\n"
        "children = psutil.Process().children(recursive=True); assert children; [c.suspend() for c in children]\n"
        "start = time.monotonic()\n"
        "many = {f'metric_{i}': 0.1 for i in range(50)}\n"
        "for step in range(4, 2001): o.on_step({'step': step, 'tokens': step, **many})\n"
        "assert time.monotonic() - start < 2, 'a step waited'\n"
        "o.on_end({}); print(len(said), said[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[3], stdin=subprocess.DEVNULL, env=without_service(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told("W&B hangs at the end of a run", done.stdout)


@pytest.mark.parametrize(("key", "reason"), [("", "monitor.wandb=offline"), ("0" * 40, "could not start (")], ids=["no key", "no server"])
def test_wandb_online_out_of_reach_neither_asks_nor_stops(tmp_path: Path, key: str, reason: str) -> None:
    # In a process of its own, with a home of its own: W&B remembers keys per process, and the user's must not be used.
    script = (
        "import sys, wandb; from pathlib import Path; from train.observe import MonitorConfig, RunInfo\n"
        "from train.observe import wandb_observer; from train.observe.wandb_observer import WandbObserver\n"
        "wandb_observer.GRACE_SECONDS = 30\n"
        "said = []; o = WandbObserver(MonitorConfig(wandb='online', wandb_timeout_seconds=2), said.append)\n"
        "o.on_start(RunInfo({}, Path(sys.argv[1]), 1, 1, 0, 10, 1)); o.on_step({'step': 1, 'tokens': 1})\n"
        "o.on_end({}); print(len(said), said[0])\n"
    )
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment = {
        **kept,
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # nothing listens there
        "PYTHONPATH": str(Path(__file__).parents[3]),
        **({"WANDB_API_KEY": key} if key else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 W&B could not start (") and reason in done.stdout
    assert not key or key not in done.stdout + done.stderr
    if key:
        told("W&B is out of reach", done.stdout, "could not start")
    else:
        told("W&B: no API key", done.stdout)


@pytest.mark.parametrize(
    ("end", "calls"),
    [
        (lambda o: o.on_end({"step": 1, "eval/loss": 2.0}), [("finish", 0)]),
        (lambda o: o.on_end({"step": 1, "stopped": "a signal", "signal": "SIGTERM"}), [("preempting", None), ("finish", 75)]),
        (lambda o: o.on_error(ValueError("x")), [("finish", 1)]),
        (lambda o: None, [("finish", 1)]),
    ],
    ids=["finished", "stopped", "failed", "closed alone"],
)
def test_a_wandb_run_ends_as_the_run_did(
    end: Any, calls: list[tuple[str, int | None]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import wandb

    heard: list[tuple[str, int | None]] = []

    class Service:
        summary: dict[str, Any] = {}  # noqa: RUF012

        def define_metric(self, *arguments: Any, **named: Any) -> None: ...

        def mark_preempting(self) -> None:
            heard.append(("preempting", None))

        def finish(self, exit_code: int) -> None:
            heard.append(("finish", exit_code))

        def log(self, *arguments: Any, **named: Any) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **arguments: Service())
    observer = WandbObserver(MonitorConfig(), print)
    observer.on_start(run_info(tmp_path))
    end(observer)
    observer.close()
    assert heard == calls


# -- online, against a server of our own ----------------------------------------------------------------------------------------------


ONLINE = """
import json, sys, time
from pathlib import Path
from tests.train.observe.test_wandb import Watched
from tests.train.observe.wandb_server import WandbServer
from train.observe import MonitorConfig, wandb_observer, wandb_session
import os
server = WandbServer()
os.environ["WANDB_BASE_URL"] = server.url
run_dir, config = Path(sys.argv[1]), MonitorConfig(wandb="online", wandb_timeout_seconds=float(sys.argv[2]))
def steps(): return [row["_step"] for row in next(iter(server.history.values()), [])]
"""


def online(script: str, run_dir: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a script with a key and a home of its own; its output holds no key, nor does any file it leaves."""
    home = run_dir.parent / "home"
    home.mkdir()
    key = "0123456789abcdef" * 2 + "deadbeef"
    (home / "netrc").write_text(f"machine 127.0.0.1 login user password {key}\n")
    (home / "netrc").chmod(0o600)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment = {
        **kept,
        "HOME": str(home),
        "NETRC": str(home / "netrc"),
        "WANDB_API_KEY": key,
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    done = subprocess.run(
        [sys.executable, "-c", ONLINE + script, str(run_dir), str(timeout)],
        env=environment, cwd=run_dir.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert key not in done.stdout + done.stderr
    for path in run_dir.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
    return done


@pytest.mark.slow
def test_online_a_run_continues_where_the_server_is(tmp_path: Path) -> None:
    """Also where it was away in between; the answer to what it has is the server's."""
    script = """
first = Watched(run_dir, config=config); first.train(6); first.end(stopped="a signal", signal="SIGTERM")
assert steps() == [1, 2, 3, 4, 5, 6], steps()
wandb_observer.FIRST_RETRY_SECONDS = 0.2
server.down = True
second = Watched(run_dir, 4, MonitorConfig(wandb="online", wandb_timeout_seconds=4)); second.train(9)
deadline = time.monotonic() + 60
while not second.wandb._lines and time.monotonic() < deadline: time.sleep(0.1)
server.down = False
second.train(12)
while steps()[-1] < 11 and time.monotonic() < deadline: time.sleep(0.1)
second.end()
assert steps() == list(range(1, 13)), steps()
assert second.slowest < 0.3, second.slowest
assert "behind step 6" in second.said[-1], second.said
names = [u for u in server.upserts if u.get("displayName")]
assert {u["host"] for u in names} == {"not-recorded"} and {u["program"] for u in names} == {"train"}
"""
    assert "less than the current step" not in online(script, tmp_path / "run").stderr


@pytest.mark.slow
def test_online_a_slow_server_does_not_slow_the_run(tmp_path: Path) -> None:
    script = """
server.delay = 30.0
wandb_observer.GRACE_SECONDS = 1.0
begin = time.monotonic()
watched = Watched(run_dir, config=config)
watched.train(500)
assert watched.slowest < 0.5 and time.monotonic() - begin < 10, (watched.slowest, time.monotonic() - begin)
begin = time.monotonic()
watched.end()
assert time.monotonic() - begin < 25
print(watched.said)
"""
    assert "did not answer any more" in online(script, tmp_path / "run", timeout=3).stdout


def test_synced_starts_are_one_run(tmp_path: Path) -> None:
    """`wandb sync`, as documented, of a run that was started twice."""
    script = """
import subprocess
first = Watched(run_dir); first.train(6); first.end(stopped="a signal", signal="SIGTERM")
second = Watched(run_dir, 4); second.train(10); second.end()
os.environ.pop("WANDB_SERVICE", None)
done = subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, run_dir.glob("wandb/offline-run-*"))], capture_output=True, text=True)
assert done.returncode == 0, done.stdout + done.stderr
assert list(server.history) == [first.wandb.id] and steps() == list(range(1, 11)), server.history
"""
    online(script, tmp_path / "run")
