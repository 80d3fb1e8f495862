"""The Mamba-2 mixer against transformers' NemotronH and against its own documents run alone."""

import pytest
import torch
from torch import nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from model.convolution import causal_convolution
from model.mamba import MambaMixer, MambaSizes
from parallel.shards import pieces_of
from tests.model.build import CONFIG, disturb, microbatch, open_context, packed


def oracle_config(time_step_min: float) -> NemotronHConfig:
    sizes = CONFIG.sizes(MambaSizes)
    return NemotronHConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        layers_block_type=["linear_attention"],
        mamba_num_heads=sizes.mamba_heads,
        mamba_head_dim=sizes.mamba_head_dim,
        ssm_state_size=sizes.mamba_state_size,
        n_groups=sizes.mamba_groups,
        conv_kernel=sizes.mamba_conv_width,
        chunk_size=32,
        layer_norm_epsilon=CONFIG.norm_eps,
        time_step_min=time_step_min,
    )


def state_of(mixer: nn.Module) -> dict[str, torch.Tensor]:
    """Stored tensors of one rank's module, by name below the mixer's."""
    state: dict[str, torch.Tensor] = {}
    for param in mixer.parameters():
        for piece in pieces_of(param):
            whole = state.setdefault(piece.name.removeprefix("m."), torch.full(piece.shape, torch.nan))
            part = param.detach()[piece.local]
            whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, part.shape, strict=True))] = part
    return state


@pytest.mark.parametrize("length", [5, 100, 130])
def test_equals_nemotron_h_with_gradients(length: int) -> None:
    with open_context() as context:
        ours = MambaMixer(context, "m")
        disturb(ours)
        with torch.no_grad():
            ours.dt_bias.sub_(torch.linspace(0, 8, len(ours.dt_bias)))  # steps down to 1e-6, far below the usual clamp
        theirs = NemotronHMamba2Mixer(oracle_config(1e-30), layer_idx=0)
        theirs.load_state_dict(state_of(ours), strict=True)
        torch.manual_seed(length)
        x = torch.randn(length, 2, CONFIG.hidden_size, requires_grad=True)
        y = ours(x, microbatch(length))
        x_theirs = x.detach().transpose(0, 1).contiguous().requires_grad_()
        expected = theirs(x_theirs)
        torch.testing.assert_close(y.transpose(0, 1), expected, atol=1e-5, rtol=1e-5)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy.transpose(0, 1))
        assert x.grad is not None and x_theirs.grad is not None
        torch.testing.assert_close(x.grad.transpose(0, 1), x_theirs.grad, atol=1e-5, rtol=1e-4)
        # Where the clamp of the released configuration would bite, so that the comparison above means something.
        clamped = NemotronHMamba2Mixer(oracle_config(1e-3), layer_idx=0)
        clamped.load_state_dict(state_of(ours), strict=True)
        assert (clamped(x_theirs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("length", [70, 128])
def test_packed_documents_equal_each_document_alone(length: int) -> None:
    with open_context() as context:
        mixer = MambaMixer(context, "m")
        disturb(mixer)
        documents = packed(length)
        x = torch.randn(length, 2, CONFIG.hidden_size)
        together = mixer(x, microbatch(length, documents=documents))
        for row in range(2):
            for ordinal in documents[row].unique():
                where = documents[row] == ordinal
                alone = mixer(x[where, row : row + 1], microbatch(int(where.sum()), 1))
                torch.testing.assert_close(alone[:, 0], together[where, row], atol=2e-6, rtol=1e-5)


def reference_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    rows = []
    for t in range(len(x)):
        total = bias.expand(x.shape[1:])
        for back in range(min(weight.shape[-1], t + 1)):
            tap = weight[:, 0, weight.shape[-1] - 1 - back] * x[t - back]
            if documents is not None:
                tap = tap * (documents[:, t] == documents[:, t - back]).unsqueeze(-1)
            total = total + tap
        rows.append(total)
    return nn.functional.silu(torch.stack(rows))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("reset", [False, True])
def test_convolution_and_its_gradients_equal_the_definition_in_fp64(width: int, length: int, reset: bool) -> None:
    generator = torch.Generator().manual_seed(length + width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    arguments = normal(length, 2, 6), normal(6, 1, width), normal(6)
    documents = (torch.rand(2, length, generator=generator) < 0.2).cumsum(1).int() if reset else None
    fast = [t.clone().requires_grad_() for t in arguments]
    exact = [t.double().requires_grad_() for t in arguments]
    y = causal_convolution(fast[0], fast[1], fast[2], documents)
    expected = reference_convolution(exact[0], exact[1], exact[2], documents)
    dy = normal(length, 2, 6)
    y.backward(dy)
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected, atol=2e-6, rtol=2e-6)
    for ours, theirs in zip(fast, exact, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=5e-6, rtol=5e-6)
