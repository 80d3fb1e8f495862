"""Every command line of README, CONTRIBUTING and docs runs as it is written, with overrides appended that shorten it.

A line nobody has said here how to shorten fails, so none can be added untested. `make` targets are only expanded: what they start is listed too.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
PROGRAMS = (
    r"(?:[A-Z_]+=\S+ +)*(?:python3?|torchrun|ft_launcher|sh|make|pytest|pip|git|ruff|mypy|cd|srun|sbatch|\.venv/bin/\S+|\. \.venv\S+)\s"
)

QUICK = "train.steps=2 train.sequence_length=64 monitor.wandb=disabled data.validation_fraction=0.001 data.cache={cache}"
FIRST = "python -m train -cn tiny train.steps=200 run.dir=runs/first"
EXPORT = "python -m train.export checkpoint=runs/first to=exported"
BRANCH = "python -m train.branch checkpoint=runs/x precision=bf16 run.dir=runs/bf16"
BLEND = "python -m train -cn tiny run.dir=runs/blend run.stop_after=50%"
SUBMIT = "python -m launch.slurm -cn nemotron3_super cluster=b200"
QUESTIONS = "python -m data.questions to=runs/tasks"
SWEEP = "python -m train -cn nvfp4_gap -m"
RETRIEVAL = "python -m train -cn retrieval"
DRAFTS = "python -m experiments.acceptance"
RECALL = "python -m experiments.retrieval"
NEEDLES = "python -m experiments.retrieval.needles"


@dataclass(frozen=True)
class Way:
    """How a command is run. append: what shortens it. after: commands whose results it reads. copies: run directories that are copies of
    runs/first. makes: files or directories that must be there afterwards. says: what it prints. needs: an optional package."""

    append: str = ""
    after: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    says: str = ""
    slow: bool = False
    needs: str = ""


# Whole command lines first; then what all lines of a kind need, by regular expression.
WAYS: dict[str, Way] = {
    FIRST: Way(QUICK, makes=("runs/first/finished.json", "runs/first/report/loss.png"), says="Finished 2 steps"),
    "python -m train -cn tiny precision=mxfp8 --cfg job": Way(says="default: mxfp8", slow=True),
    "python -m train --help": Way(says="optimizer.decay"),
    "torchrun --nproc-per-node 4 -m train -cn tiny parallel.tensor=2 parallel.expert=2": Way(
        f"{QUICK} run.dir=runs/four", makes=("runs/four/finished.json",), says="4 ranks on cpu"
    ),
    "torchrun --nproc-per-node 2 -m train -cn tiny parallel.context=2": Way(
        f"{QUICK} run.dir=runs/split", makes=("runs/split/finished.json",), says="context 2", slow=True
    ),
    "torchrun --nproc-per-node 2 -m train -cn tiny parallel.context=2 parallel.context_mamba=all_to_all": Way(
        f"{QUICK} run.dir=runs/heads", makes=("runs/heads/finished.json",), says="context 2", slow=True
    ),
    "python -m train -cn tiny evaluation.evaluators=[validation,acceptance]": Way(
        f"{QUICK} run.dir=runs/acceptance", makes=("runs/acceptance/finished.json",), says="drafts accepted: novels", slow=True
    ),
    "python -m train -cn tiny_mtp checkpoint.initialize_from=runs/tiny": Way(
        f"{QUICK} run.dir=runs/mtp", copies=("runs/tiny",), makes=("runs/mtp/finished.json",), says="drafts accepted: novels", slow=True
    ),
    "python -m train.branch checkpoint=runs/tiny/checkpoints/step-00000240 train.only=mtp": Way(
        "checkpoint=runs/x/checkpoints/step-00000002 train.steps=3 run.dir=runs/mtp-branch",
        copies=("runs/x",),
        makes=("runs/mtp-branch/finished.json",),
        slow=True,
    ),
    "python -m train -cn tiny data.alternate_length=32": Way(
        f"{QUICK} run.dir=runs/alternate", makes=("runs/alternate/finished.json",), slow=True
    ),
    "torchrun --nproc-per-node 2 -m train -cn tiny parallel.pipeline=2 parallel.virtual_pipeline=2": Way(
        f"{QUICK} run.dir=runs/interleaved", makes=("runs/interleaved/finished.json",), says="pipeline stage 1", slow=True
    ),
    "torchrun --nproc-per-node 2 -m train -cn tiny parallel.engine=deepspeed parallel.zero_stage=2": Way(
        f"{QUICK} run.dir=runs/zero", makes=("runs/zero/finished.json",), says="DeepSpeed ZeRO-2", slow=True, needs="deepspeed"
    ),
    "python -m launch.local ranks=2 -cn tiny parallel.tensor=2": Way(
        f"{QUICK} run.dir=runs/two", makes=("runs/two/finished.json",), says="2 ranks on cpu", slow=True
    ),
    "python -m launch.local ranks=2 restarts=3 -cn tiny": Way(
        f"{QUICK} run.dir=runs/restarts", makes=("runs/restarts/finished.json",), says="2 ranks on cpu", slow=True
    ),
    "python -m launch.local ranks=2 command=train.branch checkpoint=runs/x precision=bf16": Way(
        "train.steps=3 run.dir=runs/bf16-two", copies=("runs/x",), makes=("runs/bf16-two/finished.json",), says="2 ranks on cpu", slow=True
    ),
    "torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m train -cn tiny": Way(
        f"{QUICK} run.dir=runs/supervised", makes=("runs/supervised/finished.json",), says="2 ranks on cpu", slow=True
    ),
    f"{SUBMIT} cluster.nodes=8": Way("--dry-run", says="#SBATCH --gpus-per-node=8"),
    f"{SUBMIT} cluster.nodes=8 submit=false": Way(makes=("runs/nemotron3_super/slurm.sh",), slow=True),
    f"{SUBMIT} cluster.nodes=8 --dry-run": Way(says="arguments=(-cn nemotron3_super cluster=b200 cluster.nodes=8)", slow=True),
    "python -m launch.slurm -cn nvfp4_gap cluster=h100 -m": Way("--dry-run run.seed=7,8", says="case $SLURM_ARRAY_TASK_ID in", slow=True),
    QUESTIONS: Way(makes=("runs/tasks/austen_next.yaml",), says="austen_next (300 documents)"),
    "python -m train.evaluate checkpoint=runs/first tasks=[austen_next] include=runs/tasks": Way(
        "limit=2", after=(FIRST, QUESTIONS), says="|austen_next|", needs="lm_eval", slow=True
    ),
    "python -m train.generate checkpoint=runs/first prompt='It is a truth' tokens=100 temperature=0.8": Way(
        "tokens=5", after=(FIRST,), says="It is a truth", slow=True
    ),
    "python -m launch.status runs/first": Way(after=(FIRST,), says="step        2 of 2"),
    "python -m launch.preflight -cn tiny cluster=cpu": Way("run.dir=runs/preflight", says="1 node, 1 rank fit", slow=True),
    "python -m train -cn tiny -m precision=nvfp4,bf16 run.seed=1,2": Way(QUICK, says="4 jobs, 4 finished", slow=True),
    SWEEP: Way(f"{QUICK} train.steps=20 precision=fp32,nvfp4 run.seed=1", says="2 jobs, 2 finished", slow=True),
    DRAFTS: Way(
        "\"overrides=['train.steps=2','train.sequence_length=64','run.seed=1','precision=nvfp4','model.mtp_shared=true','model.mtp_loss_scale=0.3',"
        "'evaluation.acceptance.windows=2']\"",
        makes=("runs/acceptance-sweep/report/domains.png",),
        says="heads trained on",
        slow=True,
    ),
    "python -m experiments.acceptance train=false to=docs/acceptance": Way(
        after=(DRAFTS,), makes=("docs/acceptance/training.png",), slow=True
    ),
    "python -m experiments.nvfp4_gap": Way(after=(SWEEP,), makes=("runs/nvfp4_gap-sweep/report/gap.png",), slow=True),
    "python -m experiments.nvfp4_gap to=docs/nvfp4_gap": Way(after=(SWEEP,), makes=("docs/nvfp4_gap/gap.png",), slow=True),
    EXPORT: Way(after=(FIRST,), makes=("exported/config.json",), slow=True),
    "python -m train.export checkpoint=runs/first to=served dtype=bf16 readers=[vllm,sglang]": Way(
        after=(FIRST,), makes=("served/generation_config.json",), says="Read by transformers, vllm, sglang, megatron_bridge", slow=True
    ),
    "python -m train.export checkpoint=runs/first to=packed format=nvfp4": Way(
        after=(FIRST,), makes=("packed/model.safetensors",), says="Read by vllm, sglang", slow=True
    ),
    "python -m train.import_hf checkpoint=exported to=runs/imported": Way(after=(FIRST, EXPORT), makes=("runs/imported",), slow=True),
    BLEND: Way(QUICK, says="stop_after", slow=True),
    'python -m train -cn tiny run.dir=runs/blend \'data.phases=[{blend:[{path:"corpus:austen",weight:3},{path:"corpus:jargon",weight:1}]}]\' '
    "run.allow=[data.phases]": Way(QUICK, after=(BLEND,), says="data phase 2: 75% corpus:austen, 25% corpus:jargon", slow=True),
    "python -m train.report runs=[runs/a,runs/b] to=runs/report": Way(copies=("runs/a", "runs/b"), makes=("runs/report/loss.png",)),
    BRANCH: Way("train.steps=3 run.dir=runs/bf16", copies=("runs/x",), makes=("runs/bf16/finished.json",), slow=True),
    "python -m train.report runs=[runs/x,runs/bf16]": Way(
        copies=("runs/x",), after=(BRANCH,), makes=("runs/x/report/loss.png",), slow=True
    ),
    "python -m train.branch checkpoint=runs/x branch=[bf16,fp32] every=240steps": Way(
        "every=1steps train.steps=3", copies=("runs/x",), says="2 branches, 2 finished", slow=True
    ),
    "python -m train.dashboard run=runs/first": Way(
        after=(FIRST,), makes=("runs/first/report/index.html",), says="No W&B workspace", slow=True
    ),
    "python -m data.prepare input=texts/ tokenizer=bytes to=prepared/texts": Way(
        makes=("prepared/texts.bin", "prepared/texts.idx"), slow=True
    ),
    "python -m train.recipe.document to=docs/recipes.md": Way(makes=("docs/recipes.md",), slow=True),
    ".venv/bin/python -m docs.nvfp4_pictures run=runs/tiny to=docs/nvfp4": Way(
        copies=("runs/tiny",), makes=("docs/nvfp4/block.png",), slow=True
    ),
    "python -m train -cn needle": Way(
        "train.steps=2 monitor.wandb=disabled data.cache={cache} evaluation.needle.examples=2",
        says="needle/niah_multikey_1/6144",
        slow=True,
    ),
    RECALL: Way("steps=4 arms=[attention-dense] rates=[1e-3]", makes=("runs/retrieval-sweep/report/rates.png",), slow=True),
    "python -m experiments.retrieval train=false to=docs/retrieval": Way(after=(RECALL,), makes=("docs/retrieval/rates.png",), slow=True),
    NEEDLES: Way("steps=2 arms=[5to1] seeds=1", makes=("runs/needles/report/needles.png",), says="| `niah_multikey_3` | 5:1 |", slow=True),
    "python -m experiments.retrieval.needles train=false to=docs/retrieval": Way(
        after=(NEEDLES,), makes=("docs/retrieval/needles.png",), slow=True
    ),
    "python -m train.evaluate checkpoint=runs/retrieval evaluators=[mqar]": Way(after=(RETRIEVAL,), says="mqar/512x64", slow=True),
    RETRIEVAL: Way("train.steps=2 monitor.wandb=disabled data.cache={cache} evaluation.mqar.examples=4", says="mqar/512x64", slow=True),
    "python -m model.precision.certify": Way(slow=True),
    "python -m model.precision.certify backend=transformer_engine to=certificate.json": Way("backend=reference", slow=True),
}
KINDS: tuple[tuple[str, Way], ...] = (
    (r"python -m train\.generate checkpoint=runs/tiny\b", Way("checkpoint=runs/first tokens=5", after=(FIRST,), slow=True)),
    (
        r"python -m train\.evaluate checkpoint=runs/tiny evaluators=",
        Way("checkpoint=runs/first", after=(FIRST,), says="drafts accepted", slow=True),
    ),
    (r"python -m train\.evaluate checkpoint=runs/first\b", Way(after=(FIRST,), says="nats per token", slow=True)),
    (
        r"python -m train\.checkpoints runs/first merge=",
        Way("merge=[1,2]", after=(FIRST,), makes=("runs/merged/recipe.yaml",), says="merged", slow=True),
    ),
    (r"python -m train\.checkpoints runs/first", Way(after=(FIRST,), says="runs/first/checkpoints", slow=True)),
    (r"python -m train\.count -cn \w+$", Way(says="active per token", slow=True)),
    (r"python -m parallel\.inspect ", Way(says="rank 137 of 1024", slow=True)),
    (r"python -m train -cn tiny \S*precision\.schedule=", Way(f"{QUICK} run.dir=runs/schedule", says="Finished 2 steps", slow=True)),
    (r"python -m train\.report\.compare", Way(f"{QUICK} to=runs/compare", makes=("runs/compare/report/gap.png",), slow=True)),
    (
        r"python -m train -cn tiny parallel\.recompute=",
        Way(f"{QUICK} run.dir=runs/recompute", says="computing norm, activation", slow=True),
    ),
    (r"python -m benchmarks\.quantize", Way("size=64 rounds=1", slow=True)),
    (r"python -m benchmarks\.linear", Way("sizes=[64] rounds=1", slow=True)),
    (r"python -m benchmarks\.step", Way("rounds=1", slow=True)),
    (r"python -m tests\.layouts ", Way("count=1", says="one rank", slow=True)),
    (
        r"python -m benchmarks\.speculative",
        Way("models=[runs/first] depths=1 tokens=8 rounds=1", after=(FIRST,), says="against none", slow=True),
    ),
    (r"python -m benchmarks\.token", Way("lengths=[16,32] rounds=1", says="bytes", slow=True)),
    (r"python -m benchmarks\.long_context", Way("lengths=[64,128] rounds=1 ranks=[1,2] tokens=256", slow=True)),
    (r"python -m benchmarks\.engines", Way("rounds=1", slow=True)),
    (r"python -m benchmarks\.activations", Way("recipe=tiny tokens=64", slow=True)),
    (r"python -m benchmarks\.trace ", Way("model.pattern=ME*E/*E", says="peak memory", slow=True)),
)
EXPANDED = r"make [\w-]+"
# Not ours; srun: tests/slurm; launch/torchrun.sh: tests/launch. ft_launcher belongs to a package that is not installed for tests.
KNOWN_ELSEWHERE = r"(git|ruff|mypy|pytest|pip|cd|\.|srun|ft_launcher|([A-Z]+=\S+ )*sh launch/torchrun\.sh) "


def commands_of(path: Path) -> Iterator[str]:
    """Command lines of the fenced blocks of a page, without their comments."""
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", path.read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#\s.*$", "", line.strip().removeprefix("$ "))
            if re.match(PROGRAMS, f"{line} "):
                yield line


def written() -> dict[str, list[str]]:
    """Command line -> the pages it stands in."""
    found: dict[str, list[str]] = {}
    for path in DOCUMENTS:
        for line in commands_of(path):
            found.setdefault(line, []).append(path.name)
    return found


def way(line: str) -> Way | None:
    if line in WAYS:
        return WAYS[line]
    return next((known for pattern, known in KINDS if re.match(pattern, line)), None)


@dataclass
class Place:
    """A directory in which commands run as they would in the repository; each once."""

    path: Path
    done: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)

    def prepare(self, known: Way) -> None:
        for line in known.after:
            self.run(line)
        for copy in known.copies:
            self.run(FIRST)
            shutil.copytree(self.path / "runs/first", self.path / copy, dirs_exist_ok=True)

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        if line not in self.done:
            known = way(line)
            assert known is not None
            self.prepare(known)
            self.done[line] = self.shell(f"{line} {known.append.format(cache=self.path / 'cache')}")
        done = self.done[line]
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        programs = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            ["bash", "-c", line], cwd=self.path, env=environment, capture_output=True, text=True, check=False, timeout=280
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    path = tmp_path_factory.mktemp("commands")
    (path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    (path / "texts").mkdir()
    (path / "texts/a.txt").write_text("Every command of the documentation runs.\n" * 50)
    (path / "docs").mkdir()
    return Place(path)


def runnable() -> Sequence[object]:
    lines = [line for line in written() if way(line) is not None]
    return [pytest.param(line, marks=[pytest.mark.slow] if getattr(way(line), "slow", False) else [], id=line) for line in lines]


@pytest.mark.parametrize("line", runnable())
def test_command(line: str, place: Place) -> None:
    known = way(line)
    assert known is not None
    if known.needs and find_spec(known.needs) is None:
        pytest.skip(f"the package {known.needs} is not installed")
    done = place.run(line)
    assert known.says in done.stdout, f"{line}\n{done.stdout}"
    for made in known.makes:
        assert (place.path / made).exists(), f"{line} made no {made}\n{done.stdout}"


def test_every_command_is_known_here() -> None:
    unknown = [
        f"{line} ({', '.join(pages)})"
        for line, pages in written().items()
        if way(line) is None and not re.fullmatch(EXPANDED, line) and not re.match(KNOWN_ELSEWHERE, line)
    ]
    assert not unknown, f"say in tests/test_commands.py how these are run in a test: {unknown}"
    assert not [line for line in WAYS if line not in written()], "these stand on no page any more"


@pytest.mark.parametrize("line", [line for line in written() if re.fullmatch(EXPANDED, line)])
def test_make_targets_exist(line: str) -> None:
    done = subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_modules_that_are_mentioned_exist() -> None:
    """Also outside of blocks: `python -m train.report` in a sentence."""
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    for module in sorted(set(re.findall(r"-m ((?:train|data|model|launch|benchmarks|experiments|docs|parallel)[\w.]*\w)", text))):
        spec = find_spec(module)
        assert spec is not None, f"python -m {module} names no module"
        assert spec.submodule_search_locations is None or find_spec(f"{module}.__main__"), f"python -m {module} cannot be run"
