"""The dense layer against transformers' NemotronH."""

import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMLP

from model.mlp import MLP
from tests.model.build import CONFIG, disturb, microbatch, open_context


def test_equals_nemotron_h_with_gradients() -> None:
    with open_context() as context:
        ours = MLP(context, "m", 64)
        disturb(ours)
        config = NemotronHConfig(hidden_size=CONFIG.hidden_size, layers_block_type=["mlp"], intermediate_size=64)
        theirs = NemotronHMLP(config)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(9, 2, CONFIG.hidden_size, requires_grad=True)
        x_theirs = x.detach().clone().requires_grad_()
        y, expected = ours(x, microbatch(9)), theirs(x_theirs)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
        torch.testing.assert_close(x.grad, x_theirs.grad, atol=1e-5, rtol=1e-5)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)
