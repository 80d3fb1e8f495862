"""Every message of docs/operations.md comes out of a failure that a test injects; those that no other test has at hand are injected here."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.indexed import Writer
from launch import measure, preflight
from tests import runbook
from tests.runbook import claims, messages, plain, told
from tests.train.recipes import SMALL, recipe
from tests.train.report.runs import make_run
from tests.train.test_checkpoint_failures import before_steps, flip, until_written
from train import branching, dashboard, loop
from train.checkpoint.reader import open_checkpoint
from train.lock import RunLock
from train.observe.metrics import read_metrics
from train.recipe.cli import main as command_line
from train.report import __main__ as report

ROOT = Path(__file__).resolve().parents[1]
LENGTH = (
    "precision=fp32",
    "train.steps=10",
    "optimizer.warmup=1",
    "optimizer.decay=2",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",
)
Capture = pytest.CaptureFixture[str]


def test_every_message_is_that_of_a_failure_some_test_injects() -> None:
    known = list(claims())
    invented = [f"{message.entry}: {message.text}" for message in messages() if not any(claim.covers(message) for claim in known)]
    assert not invented, "no test produces what docs/operations.md quotes:\n" + "\n".join(invented)
    assert len(messages()) > 50, "the page is not understood any more"
    stale = [claim for claim in known if not any(claim.covers(message) for message in messages())]
    assert not stale, f"these tests name messages that docs/operations.md does not quote: {stale}"


def test_what_is_compared() -> None:
    assert plain("step   21/3,000  /tmp/x y on host a.b: s3://c/d.0a1b2c3d4e") == plain(
        "step 7/9  runs/y y on host vm: s3://e/f.ffffffffff"
    )
    with pytest.raises(AssertionError, match="but what was said is"):
        runbook.told("The newest checkpoint is damaged", "Resuming runs/x before step 3 of 4", "Resuming")
    with pytest.raises(AssertionError, match="has no such message"):
        runbook.told("The newest checkpoint is damaged", "anything", "words that nobody quotes")


# -- a run that has begun, and is started again ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped after 5 of 10 steps."""
    run_dir = tmp_path_factory.mktemp("begun") / "x"
    assert loop.run(recipe(*LENGTH, "run.stop_after=5steps", f"run.dir={run_dir}")) == 0
    return run_dir


@pytest.fixture
def run_dir(begun: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", str(begun), str(tmp_path / "x")], check=True)
    return tmp_path / "x"


def train(*arguments: str) -> int:
    return command_line(loop.run, "train", ["-cn", "tiny", *SMALL, *LENGTH, *arguments])


def test_it_goes_on_and_says_where_the_time_went(run_dir: Path, alone: None, capsys: Capture) -> None:
    assert train(f"run.dir={run_dir}") == 0
    said = capsys.readouterr().out
    told("A run was killed", said, "Resuming")
    told("Where did the time go", said)


def test_other_data(run_dir: Path, alone: None, capsys: Capture) -> None:
    assert train(f"run.dir={run_dir}", "data.phases=[{blend:[{path:'corpus:jargon'}]}]") == 2
    told("Other data from now on", capsys.readouterr().err)


def test_the_directory_is_in_use(run_dir: Path, alone: None, capsys: Capture) -> None:
    lock = RunLock(run_dir)
    lock.acquire()
    try:
        assert train(f"run.dir={run_dir}") == 2
    finally:
        lock.release()
    told("The same command is refused right after a kill", capsys.readouterr().err)


def test_all_checkpoints_are_damaged(run_dir: Path, alone: None, capsys: Capture) -> None:
    for checkpoint in (run_dir / "checkpoints").iterdir():
        flip(checkpoint / "rank-00000-000.safetensors")
    assert train(f"run.dir={run_dir}") == 2
    told("All checkpoints are damaged", capsys.readouterr().err)


def test_checkpoints_move_to_another_directory(run_dir: Path, tmp_path: Path, begun: Path, alone: None, capsys: Capture) -> None:
    """Refused while they are not there, as it is said; copied, the run goes on there, and ends as one that stayed."""
    new = tmp_path / "a large disk"
    assert train(f"run.dir={run_dir}", f"checkpoint.storage={new}") == 2
    said = capsys.readouterr().err
    told("Checkpoints are to move to another place", said.replace(str(new), "/disk"))
    assert not new.exists() and len(list((run_dir / "checkpoints").iterdir())) == 2
    new.mkdir()
    (run_dir / "checkpoints").rename(new / "checkpoints")
    assert train(f"run.dir={run_dir}", f"checkpoint.storage={new}") == 0
    assert "after step 5 of 10" in capsys.readouterr().out and not (run_dir / "checkpoints").exists()
    stayed = tmp_path / "stayed"
    subprocess.run(["cp", "-r", str(begun), str(stayed)], check=True)
    assert train(f"run.dir={stayed}") == 0
    assert [row["loss/lm"] for row in read_metrics(run_dir)] == [row["loss/lm"] for row in read_metrics(stayed)]
    ours, theirs = (open_checkpoint(place).manifest.files.values() for place in (new, stayed))
    assert {file.sha256 for file in ours} == {file.sha256 for file in theirs}
    assert train(f"run.dir={run_dir}") == 2, "the key must stay in the command"


def test_too_few_steps_for_a_trend(run_dir: Path, alone: None, capsys: Capture) -> None:
    assert train(f"run.dir={run_dir}") == 0
    assert branching.branch([f"checkpoint={run_dir}/checkpoints/step-00000008", "precision=bf16"]) == 0
    capsys.readouterr()
    made = run_dir.with_name("x-step-8-bf16")
    assert report.main([f"runs=[{run_dir},{made}]", f"to={run_dir.parent / 'report'}"]) == 0
    told("Ask what another precision", capsys.readouterr().out, "too few for a trend")


# -- disks -----------------------------------------------------------------------------------------------------------------------------


def without_override(wanted: bool) -> None:
    """Takes from this thread, and those it starts, root's right to pass over permissions, or gives it back."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: the lower halves, then the upper ones
    assert libc.capget(header, sets) == 0
    override = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    sets[0] = sets[0] & ~override if wanted else sets[0] | (sets[1] & override)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_directory_that_may_not_be_written(
    asynchronous: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None, capsys: Capture
) -> None:
    """Real EACCES, from step 7 to 10: training goes on, the error is told, what was there stays, the next save succeeds."""
    place = tmp_path / "checkpoints"

    def forbid() -> None:
        place.chmod(0o555)
        without_override(True)

    def allow() -> None:
        until_written()
        without_override(False)
        place.chmod(0o755)

    before_steps(monkeypatch, {5: until_written, 7: forbid, 10: allow})
    given = (*LENGTH, "train.steps=12", "checkpoint.every=4", "checkpoint.keep=2", f"checkpoint.asynchronous={asynchronous}")
    try:
        assert loop.run(recipe(*given, f"run.dir={tmp_path}")) == 0
    finally:
        allow()
    told("A checkpoint could not be written", capsys.readouterr().out, "Permission denied")
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13)) and rows[-1]["checkpoint/failures"] == 1
    assert sorted(path.name for path in place.iterdir()) == ["step-00000004", "step-00000012"] and open_checkpoint(tmp_path).step == 12


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_no_room_for_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None, capsys: Capture) -> None:
    """A disk of its own is full from step 4 to 7: said once, and no line is lost."""
    place = tmp_path / "disk"
    filler = place / "filler"

    def fill() -> None:
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with small_disk(place):
        before_steps(monkeypatch, {4: fill, 7: filler.unlink})
        assert loop.run(recipe(*LENGTH, "checkpoint.every=null", f"run.dir={place / 'x'}")) == 0
        assert [row["step"] for row in read_metrics(place / "x")] == list(range(1, 11))
    printed = capsys.readouterr()
    told("The disk of the run directory is full", printed.out + printed.err)
    assert (printed.out + printed.err).count("MetricsFile failed") == 1


# -- what is not there, or not as it should be -------------------------------------------------------------------------------------------


def test_the_package_for_a_store_is_missing(tmp_path: Path) -> None:
    line = ["-cn", "tiny", f"run.dir={tmp_path / 'run'}", "checkpoint.storage=s3://bucket/x"]
    code = "import sys; sys.modules['s3fs'] = None; from train.command import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *line], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    told("The package for a store is not installed", done.stderr)


def test_a_dashboard_without_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import wandb

    monkeypatch.setattr(wandb, "login", lambda **_: False)  # what it answers where no key is found; a real one may be set up here
    run = make_run(tmp_path / "first", recipe={"run": {"name": "first"}, "monitor": {"wandb": "online", "wandb_project": "p"}})
    assert dashboard.main([f"run={run}"]) == 0
    told("Looking at a run in W&B", capsys.readouterr().out)


def test_a_slow_disk_stops_the_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None, capsys: Capture) -> None:
    monkeypatch.setitem(measure.SIDES, "cpu", 64)
    quick = ("disk_bytes=100000", "gemm_seconds=0.05", "disk_bytes_per_second=1e12")
    given = ["-cn", "tiny", "cluster=cpu", f"run.dir={tmp_path / 'run'}", *(f"cluster.preflight.{key}" for key in quick)]
    assert command_line(preflight.examine, "launch.preflight", given) == 1
    told("The preflight stops a job", capsys.readouterr().err, "writes")


def test_ids_that_the_tokenizer_does_not_have(tmp_path: Path, alone: None, capsys: Capture) -> None:
    with Writer(tmp_path / "x", np.dtype(np.uint16)) as writer:
        for length in (3000, 3000, 60):
            writer.add(np.full(length, 999))
    given = ["data.validation=documents", "data.validation_fraction=0.01"]
    assert train(f"run.dir={tmp_path / 'run'}", f"data.phases=[{{blend:[{{path:{tmp_path / 'x'}}}]}}]", *given) == 2
    told("Data that hold ids", capsys.readouterr().err)


def test_a_recipe_that_would_run_code(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [tiny, _self_]\nhydra: {callbacks: {evil: {_target_: builtins.print}}}\n")
    never: Callable[[Any], int] = lambda recipe: pytest.fail("it was read")  # noqa: E731
    assert command_line(never, "train", ["-cd", str(tmp_path), "-cn", "mine"]) == 2
    told("A recipe, a checkpoint or data", capsys.readouterr().err, "_target_")
