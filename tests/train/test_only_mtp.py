"""train.only=mtp: heads are trained on a trunk that stays, bit for bit, as it was."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.recipes import recipe
from train import loop
from train.branching import branch
from train.checkpoint.reader import open_checkpoint
from train.observe.metrics import read_metrics
from train.recipe.load import load_recipe

GIVEN = ("train.steps=6", "optimizer.warmup=1", "optimizer.decay=1", "optimizer.clip=1e9", "monitor.quantization.every=2")
ONLY = (*GIVEN, "train.only=mtp", "run.seed=7")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trunk") / "run"
    assert loop.run(recipe(*GIVEN, "run.stop_after=3", f"run.dir={run_dir}")) == 0
    return run_dir


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(run_dir))
    return {name: checkpoint.read_full(name) for name in checkpoint.manifest.tensors}


def is_head(name: str) -> bool:
    return name.partition("/")[2].startswith("mtp.")


def test_the_trunk_stays_and_has_no_optimizer(trunk: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "heads"
    assert loop.run(recipe(*ONLY, f"checkpoint.initialize_from={trunk}", f"run.dir={run_dir}")) == 0
    before, after = tensors(trunk), tensors(run_dir)
    for name in (name for name in before if name.startswith("model/")):
        assert torch.equal(before[name], after[name]) != is_head(name), name
    assert any("e_score_correction_bias" in name and before[name].any() for name in before if not is_head(name)), "no bias could have moved"
    state = [name for name in after if not name.startswith("model/") and "/" in name]
    assert state and all(map(is_head, state))
    rows = read_metrics(run_dir)
    assert rows[-1]["loss/mtp_2"] < rows[0]["loss/mtp_2"]
    table = (run_dir / "log.txt").read_text()
    assert next(line for line in table.splitlines() if "mixer.in_proj" in line).split()[2:5] == ["nvfp4", "-", "-"]


def test_the_first_step_of_the_heads_is_that_of_a_whole_run(trunk: Path, tmp_path: Path) -> None:
    """From the same weights with the same batch: quantised products of the trunk are the same, so heads get the same gradients."""
    for name, only in (("heads", "mtp"), ("whole", "null")):
        given = (*GIVEN, f"train.only={only}", "run.stop_after=1", f"checkpoint.initialize_from={trunk}", f"run.dir={tmp_path / name}")
        assert loop.run(recipe(*given)) == 0
    heads, whole = tensors(tmp_path / "heads"), tensors(tmp_path / "whole")
    assert all(torch.equal(heads[name], whole[name]) for name in heads if is_head(name))
    losses = [read_metrics(tmp_path / name)[0] for name in ("heads", "whole")]
    assert all(losses[0][key] == losses[1][key] for key in ("loss/lm", "loss/mtp_1", "loss/mtp_2"))


def test_a_branch_forgets_the_state_of_the_trunk(trunk: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "branch"
    assert branch([f"checkpoint={trunk}", "train.only=mtp", f"run.dir={run_dir}"]) == 0
    before, after = tensors(trunk), tensors(run_dir)
    assert all(torch.equal(before[name], after[name]) != is_head(name) for name in before if name.startswith("model/"))
    assert all(is_head(name) for name in after if name.startswith("exp_avg"))


def trained(rank: int, trunk: str, run_dir: str, *overrides: str) -> int:
    world = int(os.environ["WORLD_SIZE"])
    given = (*ONLY, "precision=fp32", f"checkpoint.initialize_from={trunk}", f"run.dir={run_dir}", *overrides)
    return loop.run(recipe(*given, world_size=world))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.tensor=2", "parallel.expert=2"),
        ("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true"),
        ("parallel.context=2", "parallel.recompute=[norm,moe,head]"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_the_same_in_every_layout(
    trunk: Path, tmp_path: Path, ranks: Callable[[int], Callable[..., Any]], overrides: tuple[str, ...]
) -> None:
    assert loop.run(recipe(*ONLY, "precision=fp32", f"checkpoint.initialize_from={trunk}", f"run.dir={tmp_path / 'one'}")) == 0
    assert ranks(2)(trained, str(trunk), str(tmp_path / "two"), *overrides) == [0, 0]
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    for key in ("loss/lm", "loss/mtp_1", "loss/mtp_2", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=2e-5)
    before, after = tensors(trunk), tensors(tmp_path / "two")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model/") and not is_head(name))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), ["train.only=mtp", "checkpoint.initialize_from=runs/tiny", "train.branch"]),
        (("checkpoint.initialize_from=x", "model.pattern=ME"), ["train.only=mtp", "model.pattern=ME", "no MTP depth"]),
        (("checkpoint.initialize_from=x", "parallel.pipeline=2"), ["train.only=mtp", "parallel.pipeline=2"]),
        (("checkpoint.initialize_from=x", "parallel.engine=deepspeed"), ["deepspeed"]),
    ],
)
def test_what_cannot_be_is_refused(overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        load_recipe("tiny", "train.only=mtp", *overrides, world_size=None)
    assert all(word in str(refused.value) for word in words)
