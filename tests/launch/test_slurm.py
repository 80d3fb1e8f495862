"""The sbatch script: what it says, that nothing in it is read by a shell that should not be, and what is refused before Slurm is asked."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.jobs import submitted
from launch.script import Batch, Start, render
from launch.slurm import main
from parallel.cluster import ClusterConfig
from parallel.slurm import SlurmConfig
from tests.runbook import told
from tests.train.recipes import SMALL
from train.recipe.load import load_recipe
from train.recipe.reading import RecipeError

CPU = ("cluster=cpu", "cluster.nodes=2", "cluster.devices_per_node=2")
AWKWARD = [
    "a b",
    "it's",
    'say "x"',
    "$(touch pwned)",
    "`touch pwned`",
    "a\nb",
    "${HOME}",
    "*",
    "\\",
    "!!",
    ";touch pwned",
    "",
    "#x",
    "~",
    "é",
    "-n",
]


def batch(*arguments: str, slurm: SlurmConfig | None = None, directory: str = "/runs/first", device: str | None = "GPU") -> Batch:
    cluster = ClusterConfig(device=device, nodes=2, devices_per_node=8, slurm=slurm or SlurmConfig())
    return Batch("first", Path(directory), (Start(Path(directory), arguments),), cluster, "/venv/bin/python", Path("/home/me"))


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def read_by_bash(script: str, variable: str = "arguments") -> list[str]:
    """The array that a shell makes of the script, up to where it would call srun."""
    until = script[: script.index("# One process per rank")]
    done = subprocess.run(["bash", "-c", f"""{until}\nprintf '%s\\0' "${{{variable}[@]}}" """], capture_output=True, check=True, timeout=30)
    return done.stdout.decode().split("\0")[:-1]  # bytes: reading text would make \n of \r


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))), min_size=1)
)
def test_every_value_reaches_python_as_it_was_written(values: list[str]) -> None:
    assert read_by_bash(render(batch(*values))) == values


def test_what_a_recipe_says_is_run_by_no_shell(tmp_path: Path) -> None:
    words = SlurmConfig(
        partition="$(touch pwned)", account="a b", modules=("$(touch pwned)", "cuda/12 9"), srun=("--x=$(touch pwned)",),
        extra=("--comment=$(touch pwned) `x`",), container="apptainer", image="$(touch pwned).sif", mounts=("/a b:/c;touch pwned",),
        python="`touch pwned`",
    )  # fmt: skip
    script = render(batch(*AWKWARD, slurm=words, directory="/runs/$(touch pwned) 'x'"))
    fakes = "module() { printf 'module<%s>' \"$@\" >&2; }; srun() { printf '<%s>\\n' \"$@\"; }; scontrol() { :; }; tail() { :; };\n"
    done = subprocess.run(["bash", "-c", fakes + script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert list(tmp_path.iterdir()) == []
    for passed in ("--x=$(touch pwned)", "/a b:/c;touch pwned", "$(touch pwned).sif", "`touch pwned`", *AWKWARD):
        assert f"<{passed}>" in done.stdout
    assert "module<$(touch pwned)>module<cuda/12 9>" in done.stderr


def test_the_script_of_a_gpu_cluster() -> None:
    slurm = SlurmConfig(partition="batch", account="lab", time="04:00:00", cpus_per_rank=12, exclusive=True, extra=("--constraint=h100",))
    script = render(batch("-cn", "tiny", slurm=slurm))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    said = options(script)
    assert {
        "partition": "batch",
        "account": "lab",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "time": "04:00:00",
    }.items() <= said.items()
    assert {
        "cpus-per-task": "12",
        "signal": "B:USR1@120",
        "open-mode": "append",
        "chdir": "/home/me",
        "constraint": "h100",
    }.items() <= said.items()
    assert said["output"] == "/runs/first/logs/slurm-%j.log" and {"requeue", "exclusive"} <= said.keys() and "array" not in said
    assert "--cpus-per-task=12" in read_by_bash_start(script)  # srun does not take it over from sbatch
    assert len(script.splitlines()) < 65 and max(map(len, script.splitlines())) < 160


def read_by_bash_start(script: str) -> list[str]:
    line = next(line for line in script.splitlines() if line.startswith("start=("))
    done = subprocess.run(["bash", "-c", f"""{line}; printf '%s\\0' "${{start[@]}}" """], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_devices_are_asked_for_as_the_cluster_wants() -> None:
    assert options(render(batch(slurm=SlurmConfig(gpus="gres"))))["gres"] == "gpu:8"
    for nothing in (batch(slurm=SlurmConfig(gpus="none")), batch(device=None)):
        assert not {"gres", "gpus-per-node"} & options(render(nothing)).keys()


def test_containers() -> None:
    pyxis = read_by_bash_start(
        render(batch(slurm=SlurmConfig(container="pyxis", image="nvcr.io#nvidia/pytorch:25.10", mounts=("/data", "/a:/b"))))
    )
    assert {
        "--container-image=nvcr.io#nvidia/pytorch:25.10",
        "--container-mounts=/home/me:/home/me,/runs/first:/runs/first,/data:/data,/a:/b",
        "--container-workdir=/home/me",
    } <= set(pyxis)
    with pytest.raises(ValueError, match="holds a comma or a colon, and no container can mount it"):
        render(batch(slurm=SlurmConfig(container="pyxis", image="x"), directory="/runs/a,b"))
    apptainer = render(batch(slurm=SlurmConfig(container="apptainer", image="/img.sif", mounts=("/data",))))
    assert (
        "python=(apptainer exec --nv --bind /home/me --bind /runs/first --bind /data --pwd /home/me /img.sif /venv/bin/python)" in apptainer
    )
    assert "--nv" not in render(batch(slurm=SlurmConfig(container="apptainer", image="/img.sif"), device=None))


def test_a_chain_is_an_array_whose_jobs_wait_for_each_other() -> None:
    script = render(batch(slurm=SlurmConfig(requeue=False, chain=5)))
    said = options(script)
    assert said["array"] == "1-5%1" and "no-requeue" in said and said["output"].endswith("slurm-%A_%a.log")
    assert "scontrol requeue" not in script and 'scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"' in script


def test_a_percent_sign_in_a_path_is_none_of_slurms() -> None:
    script = render(batch(directory="/runs/54%j"))
    assert (
        options(script)["output"] == "/runs/54%%j/logs/slurm-%j.log" and "logs=/runs/54%%j/logs" in script and "run=/runs/54%j\n" in script
    )
    with pytest.raises(ValueError, match="holds a control character or a backslash"):
        render(batch(directory="/runs/a\nb"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("cluster.slurm.time=soon", "cluster.slurm.time='soon' is no time limit: write minutes"),
        ("cluster.slurm.chain=3", "cluster.slurm.chain=3 takes the place of requeueing"),
        ("cluster.slurm.container=pyxis", "cluster.slurm.container=pyxis and cluster.slurm.image=None go together"),
        ('cluster.slurm.extra=["constraint=x"]', "is no option: write it as --name=value"),
        ('cluster.slurm.extra=["--comment=a\\nb"]', None),
        ('cluster.slurm.setup=["a\tb"]', "is empty or holds a control character"),
        ('cluster.slurm.mounts=["a:b:c"]', "is no mount: write PATH or FROM:TO"),
        ("cluster.preflight.gemm_share=1.5", "cluster.preflight.gemm_share=1.5 is a share below 1"),
        ("cluster.preflight.disk_bytes=0", "must be positive: set cluster.preflight.enabled=false"),
    ],
)
def test_wrong_values_are_one_sentence(override: str, sentence: str | None) -> None:
    if sentence is None:
        load_recipe("tiny", override)  # a backslash and an n, which a comment may hold
        return
    with pytest.raises(RecipeError) as refused:
        load_recipe("tiny", override)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


# -- the command, against a sbatch of our own ----------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of Slurm on the PATH, as files that a test writes; none is there at first."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv(
        "PATH", f"{programs}:/usr/bin:/bin" if not Path("/usr/bin/sbatch").exists() else f"{programs}:{_without_slurm(tmp_path)}"
    )
    monkeypatch.chdir(tmp_path)
    return programs


def _without_slurm(tmp_path: Path) -> Path:
    """A directory with the programs the scripts need, on a machine where Slurm is installed beside them."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("bash", "sh", "cat", "grep"):
        (plain / name).symlink_to(f"/bin/{name}")
    return plain


def fake(programs: Path, name: str, text: str) -> None:
    path = programs / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def start(*arguments: str) -> int:
    return main(["-cn", "tiny", *SMALL, *CPU, *arguments])


def test_submission(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(fakes, "sbatch", 'printf "%s\\n" "$@" > sbatch.log; echo "4711;cluster"')
    assert start("run.dir=runs/first") == 0
    root = Path.cwd() / "runs/first"
    assert Path("sbatch.log").read_text().splitlines() == ["--parsable", str(root / "slurm.sh")]
    assert (root / "logs").is_dir() and (root / "slurm.sh").stat().st_mode & 0o100
    assert [(entry.job, entry.script) for entry in submitted(root)] == [("4711", str(root / "slurm.sh"))]
    told("Start a run on Slurm", capsys.readouterr().out, "1 run on", "submitted job", "launch.logs")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_run_with_a_job_is_not_submitted_again(fakes: Path, capsys: pytest.CaptureFixture[str], state: str) -> None:
    fake(fakes, "sbatch", "echo 4711")
    assert start("run.dir=runs/first") == 0
    fake(fakes, "scontrol", f'echo "JobId=4711 JobName=first JobState={state} Reason=None"')
    assert start("run.dir=runs/first") == 2
    said = capsys.readouterr().err
    assert f"is that of job 4711 already, which is {state}: end it with scancel 4711" in said
    told("A run is submitted a second time", said.replace("PENDING", "RUNNING"))
    fake(fakes, "scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')  # forgotten: long over
    assert start("run.dir=runs/first") == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "sbatch is not on the PATH: use a machine from which jobs are submitted"),
        (
            "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1",
            "sbatch says: Batch job submission failed: Invalid account",
        ),
        ("echo Submitted batch job", "sbatch gave no job id"),
        ("exit 3", "sbatch says: status 3"),
    ],
)
def test_what_sbatch_does_not_take_is_one_sentence(
    fakes: Path, capsys: pytest.CaptureFixture[str], text: str | None, sentence: str
) -> None:
    if text is not None:
        fake(fakes, "sbatch", text)
    assert start("run.dir=runs/first") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and sentence in errors[0], errors
    if "Invalid account" in sentence:
        told("Start a run on Slurm", errors[0], "not submitted")
    assert (Path("runs/first/slurm.sh")).exists() and not submitted(Path("runs/first"))


def test_nothing_is_submitted_for_a_recipe_that_cannot_run(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(fakes, "sbatch", "touch called")
    wrong = {
        ("parallel.tensor=8",): "parallel.tensor=8 does not divide the 4 ranks",
        ("cluster.devices_per_node=null",): "cluster.devices_per_node=null: say how many ranks a node is to have",
        ("submit=maybe",): "submit=maybe is neither submit=true nor submit=false",
        ("data.phases=[{blend:[{path:https://me:secret@host/x}]}]",): "holds a secret, which the script would keep",
    }
    for overrides, sentence in wrong.items():
        assert start("run.dir=runs/first", *overrides) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and sentence in errors[0], errors
        if "parallel.tensor" in sentence:
            told("Start a run on Slurm", errors[0], "does not divide")
    assert not Path("called").exists() and not Path("runs/first").exists()


def test_dry_run_and_submit_false(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("run.dir=runs/first", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash\n") and not Path("runs").exists()
    assert start("run.dir=runs/first", "submit=false") == 0
    assert Path("runs/first/slurm.sh").read_text() == printed
    assert "submit=" not in printed


def test_a_sweep_is_one_array(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(fakes, "sbatch", "echo x >> calls; echo 99")
    assert start("-m", "run.seed=1,2", "precision=fp32,bf16", "cluster.slurm.jobs_at_once=3") == 0
    assert Path("calls").read_text() == "x\n"
    home = Path("runs/tiny-sweep")
    script = (home / "slurm.sh").read_text()
    assert options(script)["array"] == "0-3%3"
    found = {path.name: submitted(path)[0] for path in home.iterdir() if (path / "jobs.jsonl").exists()}
    assert {entry.job for entry in found.values()} == {"99_0", "99_1", "99_2", "99_3"} and len(found) == 4
    for name, entry in found.items():
        task = entry.job.partition("_")[2]
        chosen = read_by_bash(f"SLURM_ARRAY_TASK_ID={task}\n{script}")
        assert chosen == list(entry.arguments) and f"run.dir=runs/tiny-sweep/{name}" in chosen and (home / name / "logs").is_dir()
        finished = home / name
        (finished / "finished.json").write_text(json.dumps({"step": 20}))
    # Those that are done are left out the next time.
    done = home / "seed-1__precision-fp32"
    import yaml

    from train.recipe.reading import plain

    stored = load_recipe("tiny", *SMALL, *CPU, "run.seed=1", "precision=fp32", f"run.dir={done}", world_size=4)
    (done / "recipe.yaml").write_text(yaml.safe_dump(plain(stored)))
    fake(fakes, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert start("-m", "run.seed=1,2", "precision=fp32,bf16") == 0
    assert options((home / "slurm.sh").read_text())["array"] == "0-2"
    assert "is finished, skipped" in capsys.readouterr().out


def test_a_sweep_over_clusters_is_refused(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(fakes, "sbatch", "touch called")
    assert start("-m", "cluster.nodes=1,2") == 2
    assert "one array has one: sweep other keys" in capsys.readouterr().err and not Path("called").exists()


# -- what a job does with the status a run ends with --------------------------------------------------------------------------------------


def play(tmp_path: Path, statuses: str, slurm: SlurmConfig, *, state: str = "RUNNING") -> tuple[int, str]:
    """Runs a script whose srun ends with one of `statuses` after the other; (its status, what was called)."""
    script = render(replace(batch(slurm=slurm, directory=str(tmp_path)), submitted_from=tmp_path))
    script = script.replace('run_step "$logs/preflight.log" launch.preflight', "status=0").replace("sleep 5", "")
    fakes = (
        f"statuses=({statuses}); calls={tmp_path}/calls; : > $calls\n"
        f"srun() {{ echo srun >> $calls; return ${{statuses[$(grep -c srun $calls) - 1]}}; }}\n"
        f'scontrol() {{ if [ "$1" = show ]; then echo JobState={state}; else echo "$@" >> $calls; fi; }}\n'
        'scancel() { echo scancel "$@" >> $calls; }\nSLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=6\n'
    )
    done = subprocess.run(["bash", "-c", fakes + script], capture_output=True, text=True, check=False, timeout=30, env=os.environ)
    if done.returncode == 137:
        told("A rank dies", done.stdout + done.stderr, "the run ended with status")
    return done.returncode, (tmp_path / "calls").read_text().replace("\n", " ").strip()


def test_a_job_starts_again_goes_on_or_gives_up(tmp_path: Path) -> None:
    requeue, chain = SlurmConfig(retries=2), SlurmConfig(requeue=False, chain=3)
    assert play(tmp_path, "0", requeue) == (0, "srun")
    assert play(tmp_path, "137 137 137", requeue) == (137, "srun srun srun")
    assert play(tmp_path, "2", requeue) == (2, "srun")  # a wrong recipe is no better the second time
    assert play(tmp_path, "75", requeue) == (75, "srun requeue 7")
    assert play(tmp_path, "137 1 0", requeue) == (0, "srun srun srun")
    assert play(tmp_path, "137 1 139", requeue) == (139, "srun srun srun")
    assert play(tmp_path, "1 75", requeue) == (75, "srun srun requeue 7")
    assert play(tmp_path, "75", requeue, state="CANCELLED") == (75, "srun")  # scancel ends a run for good
    assert play(tmp_path, "75", chain) == (75, "srun")
    assert play(tmp_path, "0", chain) == (0, "srun scancel --state=PENDING 6")
