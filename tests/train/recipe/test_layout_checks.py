"""Layouts that cannot be are refused in one sentence that names key and value, and the values it offers instead work."""

import copy
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from train.recipe.load import load_recipe, read_recipe
from train.recipe.reading import RecipeError, plain


@dataclass(frozen=True)
class Wrong:
    """overrides: of `recipe`, on so many ranks. says: what the sentence begins with."""

    says: str
    overrides: str = ""
    ranks: int = 1
    recipe: str = "tiny"

    def __str__(self) -> str:
        return f"{self.recipe} {self.ranks} {self.overrides}"


WRONG = [
    # ranks
    Wrong("parallel.tensor=2 does not divide the 3 ranks of this run", "parallel.tensor=2 train.global_batch_size=12", 3),
    Wrong("parallel.tensor=4 does not divide the 2 ranks of this run", "parallel.tensor=4", 2),
    Wrong("parallel.pipeline=3 does not divide the 8 ranks of this run", "parallel.pipeline=3", 8),
    Wrong("parallel.tensor=2 x parallel.pipeline=4 = 8 does not divide the 4 ranks", "parallel.tensor=2 parallel.pipeline=4", 4),
    Wrong("parallel.expert=3 does not divide the 8 ranks of this run", "parallel.expert=3", 8),
    Wrong("parallel.expert=4 x parallel.pipeline=2 = 8 does not divide the 4 ranks", "parallel.expert=4 parallel.pipeline=2", 4),
    Wrong("parallel.expert=64 does not divide the 96 ranks of this run", "", 96, "nemotron3_super"),
    Wrong("parallel.expert=32 does not divide the 48 ranks of this run", "", 48, "nemotron3_nano"),
    *(Wrong(f"parallel.{axis}=0 must be at least 1", f"parallel.{axis}=0") for axis in ("tensor", "pipeline", "expert", "context")),
    *(Wrong(f"parallel.{axis}=-2 must be at least 1", f"parallel.{axis}=-2") for axis in ("expert_tensor", "virtual_pipeline")),
    Wrong("parallel.sequence=true needs a tensor group to split over", "parallel.sequence=true"),
    # heads
    Wrong("model.key_value_heads=2 is not a multiple of parallel.tensor=4", "parallel.tensor=4", 4),
    Wrong("model.key_value_heads=2 is not a multiple of parallel.tensor=4", "parallel.tensor=4", 64, "nemotron3_super"),
    Wrong(
        "model.attention_heads=6 is not a multiple of parallel.tensor=4",
        "parallel.tensor=4 model.attention_heads=6 model.key_value_heads=6",
        4,
    ),
    Wrong("model.attention_heads=5 is not a multiple of model.key_value_heads=2", "model.attention_heads=5"),
    Wrong("model.attention_heads=4 is not a multiple of model.key_value_heads=3", "model.key_value_heads=3"),
    Wrong("model.mamba_groups=2 is not a multiple of parallel.tensor=4", "parallel.tensor=4 model.key_value_heads=4", 4),
    Wrong(
        "model.mamba_heads=34 is not a multiple of parallel.tensor=4",
        "parallel.tensor=4 model.mamba_heads=34 model.pattern=MM precision.default=bf16",
        4,
    ),
    Wrong("model.mamba_heads=31 is not a multiple of model.mamba_groups=2", "model.mamba_heads=31"),
    Wrong("model.mamba_heads=32 is not a multiple of model.mamba_groups=3", "model.mamba_groups=3"),
    Wrong("model.mamba_groups=8 is not a multiple of parallel.tensor=16", "parallel.tensor=16 model.pattern=MEMEM", 64, "nemotron3_super"),
    # experts
    Wrong("model.experts=8 is not a multiple of parallel.expert=16", "parallel.expert=16", 16),
    Wrong("model.experts=6 is not a multiple of parallel.expert=4", "parallel.expert=4 model.experts=6", 4),
    Wrong("model.experts=512 is not a multiple of parallel.expert=96", "parallel.expert=96", 192, "nemotron3_super"),
    Wrong("model.experts=128 is not a multiple of parallel.expert=256", "parallel.expert=256", 256, "nemotron3_nano"),
    Wrong("model.top_k=9 exceeds model.experts=8", "model.top_k=9"),
    Wrong("parallel.expert=4 needs MoE layers, but model.pattern='M*M' has no E", "model.pattern=M*M parallel.expert=4", 4),
    Wrong("parallel.sequence=false with parallel.tensor=2 cannot run MoE layers", "parallel.sequence=false parallel.tensor=2", 2),
    # widths
    Wrong(
        "model.shared_expert_ffn_size=255 is not a multiple of parallel.tensor=2", "parallel.tensor=2 model.shared_expert_ffn_size=255", 2
    ),
    Wrong(
        "model.ffn_hidden_size=65 is not a multiple of parallel.tensor=2", "parallel.tensor=2 model.pattern=M- model.ffn_hidden_size=65", 2
    ),
    Wrong("model.vocab_size=271 is not a multiple of parallel.tensor=2", "parallel.tensor=2 model.vocab_size=271", 2),
    Wrong("model.vocab_size=131072 is not a multiple of parallel.tensor=3", "parallel.tensor=3 parallel.expert=1", 3, "nemotron3_ultra"),
    Wrong("model.latent_size=0 must be at least 1", "model.latent_size=0"),
    Wrong("model.expert_ffn_size=0 must be at least 1", "model.expert_ffn_size=0"),
    # stages
    Wrong("parallel.pipeline=8 exceeds the 7 layers of model.pattern", "parallel.pipeline=8", 8),
    Wrong("parallel.pipeline=4 exceeds the 2 layers of model.pattern", "parallel.pipeline=4 model.pattern=M*/*E", 4),
    Wrong(
        "parallel.pipeline=128 exceeds the 88 layers", "parallel.pipeline=128 parallel.expert=1 parallel.tensor=1", 128, "nemotron3_super"
    ),
    Wrong("parallel.virtual_pipeline=2 needs parallel.pipeline > 1", "parallel.virtual_pipeline=2"),
    Wrong(
        "parallel.pipeline=4 x parallel.virtual_pipeline=2 = 8 exceeds the 7 layers", "parallel.pipeline=4 parallel.virtual_pipeline=2", 4
    ),
    Wrong(
        "parallel.virtual_pipeline=2 needs at least parallel.pipeline=2 microbatches a step, but train.micro_batch_size=16 makes 1",
        "parallel.pipeline=2 parallel.virtual_pipeline=2 train.micro_batch_size=16",
        2,
    ),
    Wrong("model.pattern='MEM|*EME' has 2 parts between its '|', but parallel.pipeline=1", "model.pattern=MEM|*EME", 2),
    Wrong("parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true", "parallel.overlap_param_gather=true"),
    Wrong(
        "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true parallel.distributed_optimizer=true",
    ),
    # sequences and batches
    Wrong("train.sequence_length=127 is not a multiple of parallel.tensor=2", "parallel.tensor=2 train.sequence_length=127", 2),
    Wrong("train.sequence_length=8191 is not a multiple of parallel.tensor=2", "train.sequence_length=8191", 64, "nemotron3_super"),
    Wrong("train.sequence_length=3 is too short for the 2 MTP depths", "train.sequence_length=3"),
    Wrong("train.global_batch_size=16 is not a multiple of the 3 data-parallel ranks", "", 3),
    Wrong("train.global_batch_size=16 is not a multiple of the 32 data-parallel ranks", "", 32),
    Wrong("train.global_batch_size=16 is not a multiple of the 3 data-parallel ranks", "parallel.tensor=2", 6),
    Wrong(
        "train.global_batch_size=3000 is not a multiple of the 512 data-parallel ranks",
        "train.global_batch_size=3000",
        1024,
        "nemotron3_super",
    ),
    Wrong("train.global_batch_size=0 must be at least 1", "train.global_batch_size=0"),
    Wrong("train.micro_batch_size=16 does not divide the 8 sequences of a step on each of 2 data-parallel", "train.micro_batch_size=16", 2),
    Wrong("train.micro_batch_size=5 does not divide the 16 sequences of a step", "train.micro_batch_size=5"),
    Wrong("train.micro_batch_size=7 does not divide the 96 sequences of a step", "train.micro_batch_size=7", 64, "nemotron3_super"),
    Wrong("train.micro_batch_size=0 must be at least 1", "train.micro_batch_size=0"),
    # split sequences
    Wrong("parallel.tensor=2 x parallel.context=2 = 4 does not divide the 6 ranks", "parallel.context=2 parallel.tensor=2", 6),
    Wrong("train.sequence_length=129 is not a multiple of parallel.context=2", "parallel.context=2 train.sequence_length=129", 2),
    Wrong(
        "train.sequence_length=120 is not a multiple of parallel.context=16 x parallel.tensor=2 = 32",
        "parallel.context=16 parallel.tensor=2 train.sequence_length=120",
        32,
    ),
    Wrong(
        "parallel.context=64 with parallel.context_mamba=all_to_all does not share out model.mamba_heads=32 and model.mamba_groups=2",
        "parallel.context=64 parallel.context_mamba=all_to_all train.sequence_length=1024",
        64,
    ),
    Wrong(
        "parallel.context=3 with parallel.context_mamba=all_to_all does not share out model.mamba_heads=32 and model.mamba_groups=2 / "
        "parallel.tensor=2",
        "parallel.context=3 parallel.tensor=2 parallel.context_mamba=all_to_all train.sequence_length=192",
        6,
    ),
    Wrong("parallel.context=64 leaves a rank 2 of train.sequence_length=128 tokens, but Mamba-2 layers need 3", "parallel.context=64", 64),
    # split experts
    Wrong(
        "model.expert_ffn_size=128 is not a multiple of parallel.expert_tensor=3", "parallel.expert_tensor=3 train.global_batch_size=12", 3
    ),
    Wrong("parallel.expert_tensor=2 needs MoE layers, but model.pattern='M*' has no E", "model.pattern=M* parallel.expert_tensor=2", 2),
    Wrong(
        "with parallel.expert_tensor=16, precision asks for nvfp4 in layers.1.mixer.experts.up_proj, whose weight on one rank is 8 x 64",
        "parallel.expert_tensor=16",
        16,
    ),
    # formats
    Wrong(
        "with train.micro_batch_size=3 and train.sequence_length=24, precision asks for nvfp4 in layers.0.mixer.in_proj, which gets 72 tokens",
        "train.micro_batch_size=3 train.global_batch_size=3 train.sequence_length=24",
    ),
    Wrong(
        "with parallel.tensor=4, precision asks for nvfp4 in layers.0.mixer.in_proj, whose weight on one rank is 168 x 128",
        "parallel.tensor=4 model.key_value_heads=4 model.mamba_groups=4 model.mamba_state_size=16 model.mamba_heads=32 model.mamba_head_dim=8",
        4,
    ),
]
OFFERED = re.compile(r"use ([\w.]+)=(\w+)(?: or (\w+))?|start (\d+)(?: or (\d+))? ranks?")


@cache
def shipped(name: str) -> dict[str, Any]:
    """A shipped recipe as plain containers: Hydra takes longer to compose it than a hundred checks take."""
    values = plain(load_recipe(name, world_size=None))
    values["train"]["micro_batch_size"] = "auto"
    return values


def read(wrong: Wrong, *more: str, ranks: int | None = None) -> None:
    values = copy.deepcopy(shipped(wrong.recipe))
    for override in (*wrong.overrides.split(), *more):
        key, value = override.split("=", 1)
        group, name = key.split(".")
        values[group][name] = yaml.safe_load(value)
    read_recipe(values, ranks or wrong.ranks)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_one_sentence_whose_remedies_work(wrong: Wrong) -> None:
    with pytest.raises(RecipeError) as refusal:
        read(wrong)
    sentence = str(refusal.value)
    assert sentence.startswith(wrong.says) and "\n" not in sentence and not dist.is_initialized()
    offers = OFFERED.findall(sentence)
    assert offers, sentence
    for key, *values, fewer, more in offers:
        for value in filter(None, values):
            read(wrong, f"{key}={value}")
        for ranks in filter(None, (fewer, more)):
            read(wrong, ranks=int(ranks))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["torch.distributed.run", "--nproc-per-node", "2", "-m", "train"], ["launch.local", "ranks=2"]], ids=" ".join
)
def test_two_ranks_say_it_once(command: list[str]) -> None:
    line = [sys.executable, "-W", "ignore", "-m", *command, "-cn", "tiny", "parallel.tensor=4"]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False, timeout=280)
    said = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert said == ["error: parallel.tensor=4 does not divide the 2 ranks of this run: use parallel.tensor=2"], done.stderr
    assert done.returncode != 0 and "train/" not in done.stdout
    if command[0] == "launch.local":
        assert done.stderr.strip() == said[0]
