"""Observers: what they write, and that it survives kills, resumes and failures."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from train.observe import MonitorConfig, Observer, Observers, RunInfo, open_observers
from train.observe.console import Console, duration
from train.observe.metrics import MetricsFile, read_metrics
from train.observe.redact import REMOVED, without_secrets
from train.observe.wandb_observer import WandbObserver

RECIPE = {
    "run": {"name": "unit", "seed": 7},
    "model": {"pattern": "ME*E/*E", "hidden_size": 64, "latent_size": None},
    "precision": {"default": "nvfp4", "rules": [{"module": "lm_head", "format": "bf16"}]},
}


def run_info(run_dir: Path, step: int = 0, total: int = 10, **changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "recipe": RECIPE,
        "run_dir": run_dir,
        "parameters": 1_234_567,
        "active_parameters": 1_000_000,
        "step": step,
        "total_steps": total,
        "tokens_per_step": 2048,
        "resumed": step > 0,
    }
    return RunInfo(**{**values, **changes})


def metrics_of(step: int, loss: float | None = None) -> dict[str, float | int]:
    return {
        "step": step,
        "tokens": step * 2048,
        "loss/lm": 5.0 / step if loss is None else loss,
        "loss/mtp_1": 5.5 / step,
        "loss/mtp_2": 6.0 / step,
        "grad_norm": 0.5,
        "learning_rate": 4e-3,
        "tokens_per_second": 12_345.6,
        "step_seconds": 0.166,
    }


# --- metrics.jsonl


def test_metrics_lines_are_on_disk_at_once_and_exact(tmp_path: Path) -> None:
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path))
    for step in (1, 2, 3):
        observer.on_step(metrics_of(step, loss=0.1 + 0.2 * step))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before the file is closed
        assert json.loads(lines[-1]) == metrics_of(step, loss=0.1 + 0.2 * step)
        assert len(lines) == step
    observer.on_end({})


def test_evaluation_joins_the_line_of_its_step(tmp_path: Path) -> None:
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path))
    observer.on_evaluation({"step": 0, "tokens": 0, "eval/loss": 5.5})
    observer.on_step(metrics_of(1))
    observer.on_step(metrics_of(2))
    observer.on_evaluation({"step": 2, "tokens": 4096, "eval/loss": 2.25})
    observer.on_step(metrics_of(3))
    observer.on_end({})
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    assert entries[2] == {**metrics_of(2), "eval/loss": 2.25}
    assert entries[0]["eval/loss"] == 5.5 and "eval/loss" not in entries[3]


def test_resume_drops_later_steps_and_the_torn_line(tmp_path: Path) -> None:
    first = MetricsFile()
    first.on_start(run_info(tmp_path))
    for step in range(1, 8):
        first.on_step(metrics_of(step))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "loss/l')  # the writer was killed here
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, 8))
    second = MetricsFile()
    second.on_start(run_info(tmp_path, step=4))
    for step in range(5, 11):
        second.on_step(metrics_of(step))
    second.on_end({})
    assert read_metrics(tmp_path) == [metrics_of(step) for step in range(1, 11)]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_evaluation_repeated_after_a_resume_joins_the_kept_line(tmp_path: Path) -> None:
    first = MetricsFile()
    first.on_start(run_info(tmp_path))
    for step in (1, 2, 3):
        first.on_step(metrics_of(step))
    second = MetricsFile()
    second.on_start(run_info(tmp_path, step=2))
    second.on_evaluation({"step": 2, "tokens": 4096, "eval/loss": 1.5})
    second.on_end({})
    assert read_metrics(tmp_path) == [metrics_of(1), {**metrics_of(2), "eval/loss": 1.5}]


def test_a_new_run_does_not_continue_old_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss/lm": 1.0}\n')
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path, step=0))
    observer.on_step(metrics_of(1))
    observer.on_end({})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path))
    observer.on_step({"step": 1, "tokens": 1, "loss/lm": math.nan, "grad_norm": math.inf, "loss/total": -math.inf})
    observer.on_end({})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    (entry,) = read_metrics(tmp_path)
    assert math.isnan(entry["loss/lm"]) and entry["grad_norm"] == math.inf and entry["loss/total"] == -math.inf


@pytest.mark.parametrize("content", [b"garbage\n{}\n", b'{"loss/lm": 1.0}\n', b'{"step": 1}\n[2]\n'])
def test_a_damaged_metrics_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged \(line \d"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged \(line \d"):
        MetricsFile().on_start(run_info(tmp_path, step=1))


def test_killed_writer_leaves_a_file_that_can_be_continued(tmp_path: Path) -> None:
    script = (
        "import sys, itertools; from pathlib import Path; from train.observe.metrics import MetricsFile\n"
        "from train.observe import RunInfo\n"
        "o = MetricsFile(); o.on_start(RunInfo({}, Path(sys.argv[1]), 1, 1, 0, 10**9, 1))\n"
        "for s in itertools.count(1): o.on_step({'step': s, 'tokens': s, 'loss/lm': 1 / s})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size > 20_000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = read_metrics(tmp_path)
    assert [entry["step"] for entry in before] == list(range(1, len(before) + 1))
    observer = MetricsFile()
    observer.on_start(run_info(tmp_path, step=100))
    observer.on_step(metrics_of(101))
    observer.on_end({})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, 102))


# --- console


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Drawn:
    path = Path("runs/x/report/loss.png")


def test_console_tells_the_whole_story(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(Drawn(), stream, clock)  # type: ignore[arg-type]
    console.say("W&B: offline")
    console.on_start(run_info(tmp_path, description=("data        six novels",), precision_table="TABLE\n"))
    for step in range(1, 6):
        clock.now += 2.0
        console.on_step(metrics_of(step))
    console.on_evaluation({"step": 5, "tokens": 1, "eval/loss": 2.0})
    console.on_checkpoint(5, tmp_path / "checkpoints" / "step-00000005")
    console.on_end({"step": 10, "eval/loss": 1.8, "baseline/trigram": 1.9102, "seconds": 185.0, "session_seconds": 125.0})
    text = stream.getvalue()
    assert text == (tmp_path / "log.txt").read_text()
    for expected in (
        "1,234,567 (1,000,000 active per token)",
        "pattern=ME*E/*E hidden_size=64",
        "10 steps x 2,048 tokens = 20.5k tokens",
        "data        six novels",
        "TABLE",
        "W&B: offline",
        "step  5/10  loss 1.0000  mtp 1.1000 1.2000  grad 0.500  lr 4.00e-03  12.3k tok/s  left 10s",
        "step  5/10  validation loss 2.0000 nats per token",
        "step-00000005",
        "Finished 10 steps; this session took 2m 05s of 3m 05s in all",
        "validation loss  1.8000 nats per token; 0.1102 below a trigram count model's 1.9102",
        "runs/x/report/loss.png",
        f"run directory    {tmp_path}",
    ):
        assert expected in text, expected
    assert text.index("TABLE") < text.index("W&B: offline") < text.index("step  1/10")
    assert not any(ord(character) < 32 and character != "\n" for character in text)


def test_console_says_when_a_run_stopped_or_lost_to_the_baseline(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(None, stream)
    console.on_start(run_info(tmp_path, total=60))
    console.on_step(metrics_of(30))
    console.on_end({"step": 30, "stopped": "run.stop_after=30steps", "eval/loss": 2.5, "baseline/trigram": 1.9})
    assert "Stopped (run.stop_after=30steps) after step 30 of 60" in stream.getvalue()
    assert "0.6000 above a trigram count model's 1.9000" in stream.getvalue()
    console = Console(None, stream)
    console.on_start(run_info(tmp_path, step=30, total=60))
    assert f"Resuming {tmp_path} after step 30 of 60" in stream.getvalue()
    assert (tmp_path / "log.txt").read_text() == stream.getvalue()  # the second session is appended


def test_console_prints_a_diverged_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(None, stream)
    console.on_start(run_info(tmp_path))
    console.on_step({"step": 1, "tokens": 1, "loss/lm": math.nan, "grad_norm": math.inf})
    assert "loss nan  grad inf" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.94, "9.9s"), (59.6, "1m 00s"), (185, "3m 05s"), (7620, "2h 07m"), (356400, "4d 03h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- secrets


def test_secrets_are_removed_and_ordinary_keys_stay() -> None:
    recipe = {
        "monitor": {"wandb_api_key": "abc", "password": "x", "wandb": "offline", "hub": {"token": "t"}},
        "train": {"tokens": 100, "sequence_length": 8},
        "data": {
            "tokenizer": "bytes",
            "end_of_document_token": 3,
            "sources": [{"path": "https://me:pw@host/a.txt"}, {"path": "x/0123456789abcdef/y"}],
        },
        "empty": {"secret": None},
    }
    clean = without_secrets(recipe, {"WANDB_API_KEY": "0123456789abcdef", "HOME": "offline-home", "MY_TOKEN": "1"})
    assert clean["monitor"] == {
        "wandb_api_key": REMOVED,
        "password": REMOVED,
        "wandb": "offline",
        "hub": {"token": REMOVED},
    }
    assert clean["train"] == recipe["train"]
    assert clean["data"]["tokenizer"] == "bytes" and clean["data"]["end_of_document_token"] == 3
    assert clean["data"]["sources"] == [{"path": f"https://{REMOVED}@host/a.txt"}, {"path": f"x/{REMOVED}/y"}]
    assert recipe["monitor"]["wandb_api_key"] == "abc"  # type: ignore[index]  # the caller's tree is untouched


# --- Weights & Biases


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
        cwd=Path(__file__).parents[2], stdin=subprocess.DEVNULL, env=without_service(),
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
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **({"WANDB_API_KEY": key} if key else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 W&B could not start (") and reason in done.stdout


# --- together


def test_observers_pass_every_moment_in_order_and_keep_states() -> None:
    heard: list[tuple[str, str]] = []

    class First(Observer):
        def on_step(self, metrics: Any) -> None:
            heard.append((type(self).__name__, "step"))

        def on_end(self, summary: Any) -> None:
            heard.append((type(self).__name__, "end"))

        def state(self) -> dict[str, Any]:
            return {"of": type(self).__name__}

        def load_state(self, state: Any) -> None:
            heard.append((type(self).__name__, state.get("of", "nothing")))

    class Second(First):
        pass

    both = Observers([First(), Second()])
    both.on_step({"step": 1})
    both.on_end({})
    assert both.state() == {"First": {"of": "First"}, "Second": {"of": "Second"}}
    both.load_state({"Second": {"of": "Second"}})
    assert heard == [
        ("First", "step"), ("Second", "step"), ("First", "end"), ("Second", "end"),
        ("First", "nothing"), ("Second", "Second"),
    ]  # fmt: skip


def test_a_whole_run_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observers = open_observers(MonitorConfig(wandb="disabled"))
    observers.on_start(run_info(tmp_path))
    for step in range(1, 11):
        observers.on_step(metrics_of(step))
    observers.on_evaluation({"step": 10, "tokens": 20480, "eval/loss": 1.8})
    observers.on_end({"step": 10, "eval/loss": 1.8, "baseline/trigram": 1.9})
    assert (tmp_path / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "report" / "loss.png") in capsys.readouterr().out
    assert json.loads((tmp_path / "report" / "facts.json").read_text())["baseline/trigram"] == 1.9
    assert not (tmp_path / "wandb").exists() and not (tmp_path / "wandb_id").exists()


def test_a_run_without_a_logged_step_ends_without_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observers = open_observers(MonitorConfig(wandb="disabled"))
    observers.on_start(run_info(tmp_path))
    observers.on_end({"step": 0})
    output = capsys.readouterr().out
    assert "The loss curves were not drawn" in output and f"run directory    {tmp_path}" in output


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"wandb": "on"}, "monitor.wandb='on'"), ({"wandb_project": " "}, "monitor.wandb_project"),
     ({"wandb_timeout_seconds": 0}, "monitor.wandb_timeout_seconds=0")],
)  # fmt: skip
def test_monitor_config_refuses(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        MonitorConfig(**changes).validate()
