"""Recipes for tests: the real `tiny`, composed by Hydra as the command line does, with overrides."""

from train.recipe.load import load_recipe
from train.recipe.tree import Recipe

# A model with every kind of layer that takes a few milliseconds a step.
SMALL = (
    "model.hidden_size=32",
    "model.mamba_heads=16",
    "model.mamba_head_dim=4",
    "model.mamba_state_size=16",
    "model.mamba_chunk_size=16",
    "model.attention_heads=4",
    "model.head_dim=8",
    "model.experts=4",
    "model.latent_size=16",
    "model.expert_ffn_size=32",
    "model.shared_expert_ffn_size=32",
    "train.sequence_length=64",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.steps=20",
    "train.log_every=1",
    "train.eval_every=0",
    "optimizer.warmup=4",
    "optimizer.decay=8",
    "checkpoint.every=null",
    "monitor.wandb=disabled",
    "monitor.picture=false",
    "data.validation_fraction=0.001",
)


def recipe(*overrides: str, name: str = "tiny", world_size: int = 1) -> Recipe:
    """The recipe `name` with SMALL and these overrides."""
    return load_recipe(name, *SMALL, *overrides, world_size=world_size)
