"""The command line: whatever is wrong is said in one sentence, with status 2, before anything is allocated."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from train.recipe.cli import main
from train.recipe.tree import Recipe

WRONG = [
    # what a person typed, and what the sentence must name
    (["model.patern=M"], ["model.patern=M", "model.pattern"]),
    (["foo=1"], ["foo=1"]),
    (["+train.stepz=3"], ["train.stepz", "train.steps"]),
    (["train.steps=abc"], ["train.steps='abc'", "whole number"]),
    (["train.steps=1.5"], ["train.steps=1.5", "whole number"]),
    (["train.steps=true"], ["train.steps=True"]),
    (["train.steps=[1"], ["train.steps=[1", "not understood"]),
    (["train.steps=0"], ["train.steps=0", "at least 1"]),
    (["train.steps=null"], ["train.steps", "train.tokens"]),
    (["train.tokens=1M tokens"], ["train.steps=480", "train.tokens=1M tokens", "null"]),
    (["optimizer.decay=101%"], ["optimizer.decay='101%'", "at most 100%"]),
    (["optimizer.warmup=60%"], ["optimizer.warmup=60% (288 steps)", "optimizer.decay=54.2% (260 steps)", "shares of the run"]),
    (["train.steps=null", "train.tokens=12 apples"], ["train.tokens='12 apples'", "200B tokens"]),
    (["train.steps=null", "train.tokens=12steps"], ["train.tokens=12 steps", "train.steps"]),
    (["model=huge"], ["model=huge", "tiny"]),
    (["data=none"], ["data=none", "austen"]),
    (["-cn", "nope"], ["nope", "nemotron3_super"]),
    (["model.pattern=MXE"], ["model.pattern='MXE'", "'X' at position 2"]),
    (["model.pattern=MEM//E"], ["model.pattern='MEM//E'", "empty MTP depth"]),
    (["model.pattern=ME/*E/EE"], ["MTP depths that differ", "model.mtp_shared=false"]),
    (["model.top_k=9"], ["model.top_k=9", "model.experts=8"]),
    (["model.experts=null"], ["model.experts is missing", "'E' layer"]),
    (["model.key_value_heads=3"], ["model.attention_heads=4", "model.key_value_heads=3"]),
    (["model.mamba_groups=3"], ["model.mamba_heads=32", "model.mamba_groups=3"]),
    (["model.hidden_size=-1"], ["model.hidden_size=-1", "at least 1"]),
    (["model.hidden_size=136"], ["layers.0.mixer.in_proj", "multiples of 16", "1d"]),
    (["model.vocab_size=100"], ["model.vocab_size=100", "257"]),
    (["model.norm_eps=0"], ["model.norm_eps=0", "positive"]),
    (["optimizer.warmup=300"], ["optimizer.warmup=300 steps", "optimizer.decay=54.2% (260 steps)", "run of 480 steps"]),
    (["optimizer.learning_rate=0"], ["optimizer.learning_rate=0", "positive"]),
    (["optimizer.min_learning_rate=1"], ["optimizer.min_learning_rate=1", "optimizer.learning_rate=0.004"]),
    (["optimizer.betas=[0.9,1.0]"], ["optimizer.betas[1]=1.0", "[0, 1)"]),
    (["optimizer.betas=[0.9]"], ["optimizer.betas=[0.9]", "2 values"]),
    (["optimizer.clip=0"], ["optimizer.clip=0", "positive"]),
    (["optimizer.decay_style=wobbly"], ["optimizer.decay_style='wobbly'", "minus_sqrt"]),
    (
        ["train.micro_batch_size=5"],
        ["train.micro_batch_size=5", "16 sequences", "train.global_batch_size=16", "use train.micro_batch_size=4 or 8", "auto"],
    ),
    (["train.micro_batch_size=some"], ["train.micro_batch_size='some'", "whole number or auto"]),
    (["train.micro_batch_size=0"], ["train.micro_batch_size=0", "at least 1"]),
    (["train.sequence_length=2"], ["train.sequence_length=2", "MTP depths"]),
    (["train.sequence_length=100", "train.micro_batch_size=1"], ["100 tokens", "Hadamard", "train.sequence_length=96 or 112"]),
    (["train.eval_every=-1"], ["train.eval_every=-1", "at least 0"]),
    (["parallel.tensor=3"], ["parallel.tensor=3", "the 1 rank of", "parallel.tensor=1"]),
    (["parallel.expert=2"], ["parallel.expert=2", "the 1 rank of", "parallel.expert=1"]),
    (["parallel.pipeline=0"], ["parallel.pipeline=0", "at least 1"]),
    (["parallel.virtual_pipeline=2"], ["parallel.virtual_pipeline=2", "parallel.pipeline > 1"]),
    (["parallel.overlap_param_gather=true"], ["parallel.overlap_param_gather=true", "parallel.distributed_optimizer=true"]),
    (
        ["parallel.overlap_param_gather=true", "parallel.distributed_optimizer=true"],
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
    ),
    (["model.pattern='MEM|*EME/*E/*E'"], ["2 parts between its '|'", "parallel.pipeline=1"]),
    (["model.pattern='MEM*EME/*E/*|E'"], ["'|' at position 13", "MTP depth"]),
    (["model.pattern='MEM||*EME'"], ["part of the pipeline without a layer", "every '|'"]),
    (["parallel.context=2"], ["parallel.context=2", "the 1 rank of", "parallel.context=1"]),
    (["parallel.context_mamba=ring"], ["parallel.context_mamba='ring'", "state or all_to_all"]),
    (["parallel.engine=deepspeed"], ["parallel.engine='deepspeed'", "megatron"]),
    (["parallel.sequence=true"], ["parallel.sequence=true", "parallel.tensor"]),
    (["parallel.expert_tensor=2"], ["parallel.expert_tensor=2", "1 rank of this run", "parallel.expert_tensor=1"]),
    (["precision=fp5"], ["precision=fp5", "nvfp4"]),
    (["precision.default=fp5"], ["precision.default='fp5'", "nvfp4"]),
    (["precision.rules=[{format:bf16,modules:[layers.*.atention]}]"], ["layers.*.atention", "matches no module"]),
    (["precision.rules=[{format:bf16,gems:[fprop]}]"], ["precision.rules[0].gems", "precision.rules[0].gemms"]),
    (["precision.rules=[{format:bf16,last_layers:2.0}]"], ["precision.rules[0].last_layers=2.0", "0.15"]),
    (["precision.rules=[{format:bf16,start:0.9,end:0.1}]"], ["start=0.9", "end=0.1"]),
    (["precision.schedule=[{format:bf16,start:soon}]"], ["precision.schedule[0].start='soon'", "0.82", "decay"]),
    (["precision.schedule=[{format:bf16,start:decay}]", "optimizer.decay=0"], ["precision.schedule[0].start=decay", "optimizer.decay"]),
    (["precision.schedule=[{format:bf16,start:1200steps}]"], ["precision.schedule[0]", "start=2.5"]),
    (["precision.schedule=[{format:bf16,start:200}]"], ["precision.schedule[0]", "200steps"]),
    (["precision.rules=[]"], ["layers.1.mixer.gate", "format=fp32"]),
    (["precision.backend=cuda"], ["precision.backend='cuda'", "reference"]),
    (
        ["precision.backend=triton"],
        ["precision.backend=triton cannot run: ", "triton package" if find_spec("triton") is None else "CUDA GPU"],
    ),
    (
        ["precision.backend=transformer_engine"],
        ["precision.backend=transformer_engine cannot run: ", "Blackwell" if find_spec("transformer_engine") else "not installed"],
    ),
    (["precision.compute=fp16"], ["precision.compute='fp16'", "bf16"]),
    (["precision.nvfp4.weight_scaling=3d"], ["precision.nvfp4.weight_scaling='3d'", "1d or 2d"]),
    (["precision.nvfp4.e4m3_bound=256"], ["precision.nvfp4.e4m3_bound=256", "precision.nvfp4.clipping", "448"]),
    (["optimizer.weight_decay=nan"], ["optimizer.weight_decay=nan", "finite"]),
    (["optimizer.learning_rate=inf"], ["optimizer.learning_rate=inf", "finite"]),
    (["model.mtp_loss_scale=nan"], ["model.mtp_loss_scale=nan", "finite"]),
    (["parallel.timeout_minutes=1e9"], ["parallel.timeout_minutes=1000000000.0", "within a week"]),
    (["monitor.wandb_timeout_seconds=1e12"], ["monitor.wandb_timeout_seconds=1000000000000.0", "within a day"]),
    (
        ["data.phases=[{tokens:100000,blend:[{path:'corpus:austen'}]}]"],
        ["data.phases[0].tokens=100000", "782 samples", "480 steps takes 7680", "null"],
    ),
    (["-m", "run.seed=1,2", "run.dir=runs/x"], ["run.dir=runs/x", "every job of the sweep"]),
    (["data.validation_fraction=1.5"], ["data.validation_fraction=1.5", "[0, 1)"]),
    (["data.phases=[]"], ["data.phases", "data=austen"]),
    (["data.phases=[{blend:[{path:x,weight:-1.0}]}]"], ["data.phases[0].blend[0].weight=-1.0"]),
    (["data.phases=[{blend:[{path:x}]},{blend:[{path:y}]}]"], ["data.phases[0].tokens", "last phase"]),
    (["data.phases=[{blend:[{path:/does/not/exist}]}]"], ["/does/not/exist", "does not exist"]),
    (["data.tokenizer.kind=file"], ["data.tokenizer.path", "tokenizer.json"]),
    (["monitor.observers=[nobody]"], ["monitor.observers[0]='nobody'", "register_observer"]),
    (["evaluation.evaluators=[validation,nothing]"], ["evaluation.evaluators[1]='nothing'", "validation", "register_evaluator"]),
    (["evaluation.evaluators=[validation,validation]"], ["evaluation.evaluators[1]='validation'", "twice"]),
    (["run.allow=[model.hidden_size]"], ["run.allow=[model.hidden_size]", "optimizer.learning_rate"]),
    (["monitor.wandb=sometimes"], ["monitor.wandb='sometimes'", "offline"]),
    (["checkpoint.every=0"], ["checkpoint.every=0", "null"]),
    (["checkpoint.keep=0"], ["checkpoint.keep=0", "at least 1"]),
    (["checkpoint.asynchronous=perhaps"], ["checkpoint.asynchronous='perhaps'", "true or false or auto"]),
    (["checkpoint.keep_every=0"], ["checkpoint.keep_every=0", "null"]),
    (["checkpoint.milestones=[50%,481]"], ["checkpoint.milestones[1]=481", "none of the run's 480 steps"]),
    (["checkpoint.milestones=[0]"], ["checkpoint.milestones[0]=0", "between its first and its last"]),
    (["run.seed=-1"], ["run.seed=-1"]),
    (["data.alternate_length=30"], ["data.alternate_length=30", "train.sequence_length=128", "32"]),
    (["data.alternate_length=0"], ["data.alternate_length=0", "null"]),
    (["run.name=a/b"], ["run.name='a/b'", "run.dir"]),
    (["-cn", "nemotron3_super"], ["parallel.tensor=2", "the 1 rank of"]),
]


def refuse(recipe: Recipe) -> int:
    from train.build import build

    build(recipe)
    raise AssertionError("a wrong recipe was accepted")


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=lambda value: " ".join(value)[:60])
def test_wrong_input_is_one_sentence(
    arguments: list[str],
    named: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if any("does/not/exist" in argument for argument in arguments):
        from train.loop import run
    else:
        run = refuse
    assert main(run, "train", arguments) == 2
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for part in named:
        assert part in lines[0], f"{part!r} is missing in: {lines[0]}"
    assert out == ""
    assert not list(tmp_path.iterdir())  # nothing was written


@pytest.mark.parametrize(
    "arguments",
    [["train.steps=abc"], pytest.param(["-cn", "nope"], marks=pytest.mark.slow), pytest.param(["modle=tiny"], marks=pytest.mark.slow)],
    ids=str,
)
def test_the_command_itself_ends_with_status_2_and_no_traceback(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "train", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_cfg_job_prints_the_whole_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["-cn", "tiny", "train.steps=7", "--cfg", "job", "optimizer.warmup=1"]
    assert main(refuse, "train", arguments) == 0
    values = yaml.safe_load(capfd.readouterr().out)
    assert values["train"]["steps"] == 7 and values["model"]["pattern"] == "MEM*EME/*E/*E"
    assert values["parallel"]["tensor"] == 1 and values["precision"]["default"] == "nvfp4"
