"""Weights & Biases: complete, continuous, without secrets, and never a reason for a run to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.observe.examples import RECIPE, metrics_of, run_info
from train.observe import MonitorConfig, wandb_observer
from train.observe.redact import REMOVED
from train.observe.wandb_observer import WandbObserver


def without_service() -> dict[str, str]:
    """The environment less the variable by which a child of a process that uses W&B would share its service."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: 7 bytes, then LevelDB log blocks of 32 KiB, each record in one or more
    fragments."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data = path.read_bytes()
    position, payload = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if kind == 0:
            position += left
            continue
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(payload)
            yield record
            payload = b""


def wandb_history(directory: Path) -> list[dict[str, Any]]:
    rows = []
    for record in wandb_records(next(directory.glob("*.wandb"))):
        if record.WhichOneof("record_type") == "history":
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def wandb_run(directory: Path) -> Any:
    runs = [r.run for r in wandb_records(next(directory.glob("*.wandb"))) if r.WhichOneof("record_type") == "run"]
    return runs[0]


def test_wandb_offline_is_complete_continuous_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t-value-of-the-environment"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 8 + "f" * 32)
    monkeypatch.setenv("SOME_PASSWORD", secret)
    monkeypatch.setattr(sys, "argv", ["train", f"hub.password={secret}"])
    recipe = {**RECIPE, "hub": {"password": secret, "url": f"https://u:{secret}@h/"}}

    patient = MonitorConfig(wandb_timeout_seconds=120)
    first = WandbObserver(patient)
    first.on_start(run_info(tmp_path, recipe=recipe))
    for step in range(1, 6):
        first.on_step(metrics_of(step))
    first.on_evaluation({"step": 5, "tokens": 5 * 2048, "eval/loss": 2.5})
    first.on_checkpoint(5, tmp_path)
    state = json.loads(json.dumps(first.state()))
    first.on_end({"step": 5})
    time.sleep(1.1)  # W&B names its directories by the second

    second = WandbObserver(patient)
    second.load_state(state)
    second.on_start(run_info(tmp_path, step=5, recipe=recipe))
    for step in range(6, 11):
        second.on_step(metrics_of(step))
    second.on_end({"step": 10, "eval/loss": 1.5})

    directories = sorted(path for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(directories) == 2
    # W&B's service, a process of its own, may still be writing when it says it has finished.
    deadline = time.monotonic() + 30
    while sum(len(wandb_history(directory)) for directory in directories) < 10 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {wandb_run(directory).run_id for directory in directories} == {first.id} == {second.id}
    rows = [row for directory in directories for row in wandb_history(directory)]
    assert [row["_step"] for row in rows] == list(range(1, 11))
    for step, row in enumerate(rows, start=1):
        assert {key: row[key] for key in metrics_of(step)} == metrics_of(step)
    assert rows[4]["eval/loss"] == 2.5
    config = {item.key: json.loads(item.value_json) for item in wandb_run(directories[0]).config.update}
    assert config["model"] == RECIPE["model"] and config["run"] == RECIPE["run"]
    assert config["precision"] == RECIPE["precision"] and config["parameters"] == 1_234_567
    assert config["hub"] == {"password": REMOVED, "url": f"https://{REMOVED}@h/"}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content, path
            assert os.environ["WANDB_API_KEY"].encode() not in content, path
            assert path.name not in ("wandb-metadata.json", "requirements.txt", "output.log")
    assert all(wandb_run(directory).host == "not-recorded" for directory in directories)


def test_wandb_measures_the_machine_and_never_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_observer, "SYSTEM_SECONDS", 0.2)
    monkeypatch.setenv("NIBBLE_TEST_VARIABLE", "a-value-of-the-environment")
    monkeypatch.setattr(sys, "argv", ["train", "an.argument=of-the-command-line"])
    observer = WandbObserver(MonitorConfig(wandb_timeout_seconds=120))
    observer.on_start(run_info(tmp_path))
    observer.on_step(metrics_of(1))
    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = directory.glob("*.wandb")
    deadline = time.monotonic() + 30
    measured: set[str] = set()
    while not {"cpu", "memory_percent"} <= measured and time.monotonic() < deadline:
        time.sleep(0.2)
        measured = {item.key for record in wandb_records(file) if record.WhichOneof("record_type") == "stats" for item in record.stats.item}
    observer.on_error(RuntimeError("expert 7 is on fire"))
    observer.close()
    assert {"cpu", "memory_percent", "proc.memory.rssMB"} <= measured
    deadline = time.monotonic() + 30
    while not (exits := [r.exit for r in wandb_records(file) if r.WhichOneof("record_type") == "exit"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [record.exit_code for record in exits] == [1]  # failed, not finished
    kinds = {record.WhichOneof("record_type") for record in wandb_records(file)}
    assert kinds <= {"header", "run", "telemetry", "history", "summary", "stats", "exit", "footer"}
    names = [socket.gethostname(), "a-value-of-the-environment", "of-the-command-line", sys.executable, str(Path(__file__).parents[3])]
    for name in (name.encode() for name in names if len(name) > 3):
        assert name not in file.read_bytes(), name


def test_wandb_id_survives_a_kill_before_the_first_checkpoint(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from train.observe import MonitorConfig, RunInfo\n"
        "from train.observe.wandb_observer import WandbObserver\n"
        "o = WandbObserver(MonitorConfig()); o.on_start(RunInfo({}, Path(sys.argv[1]), 1, 1, 0, 10, 1))\n"
        "o.on_step({'step': 1, 'tokens': 1, 'loss/lm': 2.0}); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=without_service())
    assert process.stdout is not None
    while (line := process.stdout.readline()) and line != "ready\n":
        pass
    assert line == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_id = (tmp_path / "wandb_id").read_text().strip()
    again = WandbObserver(MonitorConfig())
    again.on_start(run_info(tmp_path))
    again.on_end({})
    assert again.id == killed_id and len(killed_id) == 8


def test_wandb_failures_are_said_once_and_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk quota exceeded\nmore detail")

    said: list[str] = []
    monkeypatch.setattr(wandb, "init", broken)
    observer = WandbObserver(MonitorConfig(), said.append)
    observer.on_start(run_info(tmp_path))
    observer.on_step(metrics_of(1))
    observer.on_evaluation({"step": 1, "eval/loss": 1.0})
    observer.on_checkpoint(1, tmp_path)
    observer.on_end({})
    assert len(said) == 1 and "could not start (OSError: disk quota exceeded)" in said[0]


def test_wandb_failure_in_the_middle_goes_quiet(tmp_path: Path) -> None:
    class Run:
        calls = 0

        def log(self, *_: Any, **__: Any) -> None:
            self.calls += 1
            raise BrokenPipeError("service is gone")

    said: list[str] = []
    observer = WandbObserver(MonitorConfig(), said.append)
    observer._run = run = Run()
    for step in range(1, 5):
        observer.on_step(metrics_of(step))
        if observer._worker is not None:
            observer._worker.join(5)  # it ends at its first failure
    observer.on_end({})
    assert run.calls == 1 and len(said) == 1 and "BrokenPipeError: service is gone" in said[0]


def test_wandb_service_that_hangs_delays_only_the_end(tmp_path: Path) -> None:
    script = (
        "import psutil, sys, time; from pathlib import Path; from train.observe import MonitorConfig, RunInfo\n"
        "from train.observe import wandb_observer; wandb_observer._GRACE_SECONDS = 0.5\n"
        "said = []; o = wandb_observer.WandbObserver(MonitorConfig(wandb_timeout_seconds=2), said.append)\n"
        "o.on_start(RunInfo({}, Path(sys.argv[1]), 1, 1, 0, 10, 1)); said.clear()\n"
        "children = psutil.Process().children(recursive=True); assert children; [c.suspend() for c in children]\n"
        "start = time.monotonic()\n"
        "many = {f'metric_{i}': 0.1 for i in range(50)}\n"
        "for step in range(1, 2001): o.on_step({'step': step, 'tokens': step, **many})\n"
        "assert time.monotonic() - start < 2, 'a step waited'\n"
        "o.on_end({}); print(len(said), said[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[3], stdin=subprocess.DEVNULL, env=without_service(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 W&B did not answer any more")


@pytest.mark.parametrize(("key", "reason"), [("", "monitor.wandb=offline"), ("0" * 40, "could not start (")], ids=["no key", "no server"])
def test_wandb_online_out_of_reach_neither_asks_nor_stops(tmp_path: Path, key: str, reason: str) -> None:
    # In a process of its own, with a home of its own: W&B remembers keys per process, and the user's must not be used.
    script = (
        "import sys; from pathlib import Path; from train.observe import MonitorConfig, RunInfo\n"
        "from train.observe.wandb_observer import WandbObserver\n"
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
