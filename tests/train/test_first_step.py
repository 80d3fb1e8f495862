"""The first loss of the real `tiny` model is that of a uniform guess, and one batch can be learned by heart."""

import math

from parallel import groups
from tests.train.recipes import recipe
from train import loop
from train.train_step import train_step

TINY = (
    "model.hidden_size=128",
    "model.mamba_heads=32",
    "model.mamba_head_dim=8",
    "model.mamba_state_size=32",
    "model.head_dim=32",
    "model.experts=8",
    "model.latent_size=64",
    "model.expert_ffn_size=128",
    "model.shared_expert_ffn_size=256",
)


def test_the_first_loss_is_within_three_percent_of_ln_vocabulary() -> None:
    made = loop.build(recipe(*TINY))
    try:
        metrics = train_step(made, 0)
    finally:
        groups.shutdown()
    for key in ("loss/lm", "loss/mtp_1", "loss/mtp_2"):
        assert abs(metrics[key] / math.log(272) - 1) < 0.03
    total = metrics["loss/lm"] + 0.3 * (metrics["loss/mtp_1"] + metrics["loss/mtp_2"]) / 2 + metrics["moe/aux_loss"]
    assert math.isclose(metrics["loss/total"], total, rel_tol=1e-6)


def test_gradient_accumulation_does_not_change_the_step() -> None:
    results = []
    for micro in (1, 8):
        made = loop.build(recipe("precision=fp32", f"train.micro_batch_size={micro}"))
        try:
            results.append([train_step(made, step) for step in range(3)])
        finally:
            groups.shutdown()
    for one, eight in zip(*results, strict=True):
        for key in ("loss/lm", "loss/mtp_2", "grad_norm"):
            assert math.isclose(one[key], eight[key], rel_tol=1e-4 if key == "grad_norm" else 1e-6), key
