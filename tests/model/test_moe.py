"""The mixture of experts against a dense loop over tokens and experts; the router against transformers' and the published formulas."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

from model.config import ModelConfig
from model.hybrid import HybridModel, end_step
from model.moe import MoE, MoESizes, read_stamp, stamp
from model.precision.site import TokenKeys
from model.router import Router
from parallel.layout import ParallelConfig
from tests.model.build import CONFIG as DENSE
from tests.model.build import disturb, microbatch, open_context

CONFIG = DENSE.changed(
    pattern="E",
    experts=6,
    top_k=2,
    latent_size=16,
    expert_ffn_size=24,
    shared_expert_ffn_size=40,
    routed_scaling_factor=2.5,
    router_aux_loss=0.01,
)
SIZES = CONFIG.sizes(MoESizes)
LENGTH, BATCH = 24, 2


@pytest.fixture(params=[16, None], ids=["latent", "full width"])
def layer(request: pytest.FixtureRequest) -> Iterator[MoE]:
    with open_context(config=CONFIG.changed(latent_size=request.param)) as context:
        made = MoE(context, "layers.0.mixer")
        disturb(made)
        made.router.bias.copy_(torch.linspace(-0.3, 0.3, 6))
        yield made


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(LENGTH, BATCH, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


def test_every_token_gets_its_experts_weighted_and_the_shared_one(layer: MoE) -> None:
    x = hidden()
    with torch.no_grad():
        ours = layer.eval()(x, microbatch(LENGTH, BATCH))
    expected = torch.empty_like(x, dtype=torch.float64)
    up, down = layer.experts.up_proj.double(), layer.experts.down_proj.double()
    shared = layer.shared_experts
    for place in torch.cartesian_prod(torch.arange(LENGTH), torch.arange(BATCH)):
        token = x[tuple(place)].double()
        score = torch.sigmoid(layer.router.gate.weight.double() @ token)
        chosen = (score + layer.router.bias.double()).topk(SIZES.top_k).indices
        weight = score[chosen] / score[chosen].sum() * SIZES.routed_scaling_factor
        narrow = token if layer.down is None else layer.down.weight.double() @ token
        routed = sum(w * (down[e] @ (up[e] @ narrow).relu().square()) for w, e in zip(weight, chosen, strict=True))
        assert isinstance(routed, torch.Tensor)
        wide = routed if layer.up is None else layer.up.weight.double() @ routed
        expected[tuple(place)] = wide + shared.down_proj.weight.double() @ (shared.up_proj.weight.double() @ token).relu().square()
    assert (ours - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_router_of_transformers_chooses_the_same(layer: MoE) -> None:
    router = layer.router
    theirs = NemotronHTopkRouter(
        NemotronHConfig(
            hidden_size=CONFIG.hidden_size,
            n_routed_experts=SIZES.experts,
            num_experts_per_tok=SIZES.top_k,
            routed_scaling_factor=SIZES.routed_scaling_factor,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
        )
    )
    with torch.no_grad():
        theirs.weight.copy_(router.gate.weight)
        theirs.e_score_correction_bias.copy_(router.bias)
        weights, chosen = router(hidden(1), microbatch(LENGTH, BATCH))
        _, their_weights, their_choice = theirs(hidden(1))
    dense = torch.zeros_like(weights).scatter_(1, their_choice, their_weights)
    assert torch.equal(chosen, dense > 0)
    torch.testing.assert_close(weights, dense, rtol=1e-6, atol=0)


def test_the_auxiliary_loss_is_the_formula_and_reaches_the_gate(layer: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
    router: Router = layer.router.train()
    context = layer.context
    context.global_batch_size = BATCH
    x = hidden(2)
    weights, _ = router(x, microbatch(LENGTH, BATCH))
    gate = router.gate.weight.detach().double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    experts, top_k = 6, 2
    for sequence in range(BATCH):
        score = torch.sigmoid(x[:, sequence].double() @ gate.T)
        share = torch.zeros(experts, dtype=torch.float64)
        for row in score:  # without the bias: it is the balance of the scores themselves that is asked for
            share[row.topk(top_k).indices] += experts / (top_k * LENGTH)
        mean = (score / score.sum(1, keepdim=True)).mean(0)
        expected = expected + SIZES.router_aux_loss * (share * mean).sum() / BATCH
    assert router.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # The scaler hands the loss its gradient of one (Megatron's schedules say so before each backward pass), whatever the weights get.
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(1))
    (weights * 0).sum().backward()
    expected.backward()
    assert router.gate.weight.grad is not None and gate.grad is not None
    torch.testing.assert_close(router.gate.weight.grad.double(), gate.grad, rtol=1e-4, atol=1e-9)


def sent(rank: int, latent: int | None) -> tuple[list[int], list[int]]:
    """Bytes of rows, and of their weights, that one rank of two gives to every all-to-all of a forward and a backward pass."""
    rows: list[int] = []
    weights: list[int] = []
    all_to_all: Any = dist.all_to_all_single

    def counted(output: torch.Tensor, input: torch.Tensor, *given: Any, **named: Any) -> Any:
        (rows if input.dim() == 2 else weights).append(input.nbytes)
        return all_to_all(output, input, *given, **named)

    dist.all_to_all_single = counted
    try:
        with open_context(ParallelConfig(expert=2), config=CONFIG.changed(latent_size=latent)) as context:
            layer = MoE(context, "layers.0.mixer").train()
            disturb(layer)
            layer(hidden(rank).requires_grad_(), microbatch(LENGTH, BATCH)).sum().backward()
    finally:
        dist.all_to_all_single = all_to_all
    return rows, weights


@pytest.mark.parametrize("latent", [16, None], ids=["latent", "full width"])
def test_tokens_travel_in_latent_width(ranks: Callable[[int], Callable[..., list[Any]]], latent: int | None) -> None:
    width = latent or CONFIG.hidden_size
    both = ranks(2)(sent, latent)
    # To the experts and back, and their gradients the same ways.
    assert [len(rows) for rows, _ in both] == [4, 4]
    fp32, tokens = 4, 2 * LENGTH * BATCH
    for way in range(4):
        assert sum(rows[way] for rows, _ in both) == tokens * SIZES.top_k * width * fp32
    for way in range(2):  # weights go one way
        assert sum(weights[way] for _, weights in both) == tokens * SIZES.top_k * fp32


def test_the_bias_rises_for_idle_experts_and_falls_for_busy_ones() -> None:
    config: ModelConfig = CONFIG.changed(router_bias_update_rate=0.01)
    with open_context(config=config) as context:
        model = HybridModel(context)
        router = next(module for module in model.modules() if isinstance(module, Router))
        router.load.copy_(torch.tensor([9.0, 1.0, 4.0, 4.0, 6.0, 0.0]))
        assert end_step([model])["moe/max_violation"] == 9 / 4
        # The mean load is 4: an expert at the mean stays.
        torch.testing.assert_close(router.bias, torch.tensor([-0.01, 0.01, 0.0, 0.0, -0.01, 0.01]), rtol=0, atol=1e-9)
        assert router.load.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_carries_its_identity_through_the_dispatch(dtype: torch.dtype) -> None:
    keys = TokenKeys(torch.tensor([0, 1, 65_535, 65_536, 2**32 - 1]), torch.tensor([2**20, 0, 255, 256, 1_048_575]))
    again = read_stamp(stamp(keys, dtype))
    assert torch.equal(again.sample, keys.sample) and torch.equal(again.position, keys.position)
