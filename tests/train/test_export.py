"""Export loads into transformers' NemotronH with equal logits; import is its exact inverse."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.batch import Microbatch
from parallel import groups
from tests.train.recipes import recipe
from train import loop
from train.checkpoint.checkpointer import load_weights
from train.checkpoint.reader import open_checkpoint
from train.export import main
from train.huggingface.export import export
from train.huggingface.load import import_hf
from train.recipe.tree import Recipe

MODELS = {
    "latent": ("model.pattern='ME*-E/*E/*E'",),
    "full width, one block per depth": (
        "model.pattern='ME*-E/*E/*E'",
        "model.latent_size=null",
        "model.mtp_shared=false",
    ),
    "no MTP": ("model.pattern='MEM*E-'",),
}


def trained(run_dir: Path, *overrides: str) -> Recipe:
    """A few NVFP4 steps, so that no parameter is at its initial value."""
    made = recipe(
        "train.steps=4",
        "optimizer.warmup=1",
        "optimizer.decay=1",
        "model.ffn_hidden_size=48",
        f"run.dir={run_dir}",
        *overrides,
    )
    assert loop.run(made) == 0
    return made


def our_logits(values: Recipe, run_dir: Path, tokens: torch.Tensor) -> torch.Tensor:
    made = loop.build(values)
    try:
        load_weights(open_checkpoint(run_dir), made.chunks)
        made.chunks[0].eval()
        zeros = torch.zeros(tokens.shape)
        batch = Microbatch.of(
            tokens=tokens,
            labels=tokens,
            loss_mask=zeros.bool(),
            documents=zeros.int(),
            reset=False,
            sample=torch.arange(len(tokens)),
            step=0,
            depths=values.model.mtp_depths,
        )
        with torch.no_grad():
            return made.chunks[0].logits(batch)[0]
    finally:
        groups.shutdown()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    trained(run_dir, *MODELS[name])
    # Steps far below the clamp of transformers (1e-3), where the two would differ if it were on.
    checkpoint = open_checkpoint(run_dir)
    exact = recipe(
        "precision=fp32",
        "train.steps=4",
        "optimizer.warmup=1",
        "optimizer.decay=1",
        "model.ffn_hidden_size=48",
        *MODELS[name],
    )
    export(checkpoint, tmp_path / "hf")
    tokens = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(theirs).__name__ == "NemotronHForCausalLM"
    ours = our_logits(exact, run_dir, tokens)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert (ours - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert expected.std() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("Emma Wöodhouse").input_ids == list("Emma Wöodhouse".encode())


def test_steps_below_the_clamp_of_transformers(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    trained(run_dir, *MODELS["latent"])
    export(open_checkpoint(run_dir), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("dt_bias"))
    tensors[name] -= 10  # softplus of about -14 is 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    import_hf(tmp_path / "hf", tmp_path / "again")
    tokens = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    exact = recipe(
        "precision=fp32",
        "train.steps=4",
        "optimizer.warmup=1",
        "optimizer.decay=1",
        "model.ffn_hidden_size=48",
        *MODELS["latent"],
    )
    ours = our_logits(exact, tmp_path / "again", tokens)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert (ours - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_import_is_the_inverse_bit_for_bit(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    values = trained(run_dir, *MODELS[name])
    export(open_checkpoint(run_dir), tmp_path / "hf", shard_bytes=20_000)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    import_hf(tmp_path / "hf", tmp_path / "imported")
    original, again = open_checkpoint(run_dir), open_checkpoint(tmp_path / "imported")
    names = [n for n in original.manifest.tensors if n.startswith("model/")]
    assert sorted(names) == sorted(again.manifest.tensors)
    for tensor in names:
        assert torch.equal(original.read_full(tensor), again.read_full(tensor)), tensor
    blocks = {n.split(".")[2] for n in names if n.startswith("model/mtp.")}
    assert len(blocks) == {"latent": 1, "full width, one block per depth": 2, "no MTP": 0}[name]
    export(again, tmp_path / "back")
    first, second = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("hf", "back"))
    first.pop("max_position_embeddings"), second.pop("max_position_embeddings")
    assert first == second
    # A new run starts from the imported weights.
    started = loop.build(
        recipe(
            "train.steps=4",
            "optimizer.warmup=1",
            "optimizer.decay=1",
            "model.ffn_hidden_size=48",
            f"checkpoint.initialize_from={tmp_path / 'imported'}",
            f"run.dir={tmp_path / 'new'}",
            *MODELS[name],
        )
    )
    try:
        load_weights(open_checkpoint(tmp_path / "imported"), started.chunks)
        assert torch.equal(started.chunks[0].norm_f.weight, original.read_full("model/norm_f.weight"))
    finally:
        groups.shutdown()
    assert values.model.pattern == started.recipe.model.pattern


def test_wrong_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint=nowhere", f"to={tmp_path / 'x'}"]) == 2
    assert main([f"to={tmp_path / 'x'}"]) == 2
    assert main(["chekpoint=a", "to=b"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
