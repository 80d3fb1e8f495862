"""Embedding and loss against PyTorch's; several ranks in test_tensor_parallel."""

from typing import Any

import torch
from torch import nn

from model.embedding import Embedding, summed_cross_entropy
from tests.model.build import CONFIG, microbatch, open_context


def test_lookup_and_its_gradient() -> None:
    with open_context() as context:
        embedding = Embedding(context)
        batch = microbatch(40)
        x = embedding(batch.tokens[0])
        table = embedding.weight.detach().clone().requires_grad_()
        expected = nn.functional.embedding(batch.tokens[0], table).transpose(0, 1)
        assert torch.equal(x, expected)
        dy = torch.randn_like(x)
        x.backward(dy)
        expected.backward(dy)
        torch.testing.assert_close(embedding.weight.grad, table.grad)


def test_gradients_are_summed_in_fp32_into_main_grad() -> None:
    """4096 equal tokens of gradient 1 after one of 2^12: in bf16 each would be lost."""
    with open_context() as context:
        embedding = Embedding(context)
        weight: Any = nn.Parameter(embedding.weight.detach().bfloat16())
        embedding.weight = weight
        weight.main_grad = torch.zeros(weight.shape)
        dy = torch.ones(4097, 1, CONFIG.hidden_size)
        dy[0] = 4096
        embedding(torch.full((1, 4097), 3)).backward(dy.bfloat16())
        assert (weight.main_grad[3] == 8192).all()
        assert weight.main_grad.sum() == 8192 * CONFIG.hidden_size
        assert weight.grad_added_to_main_grad


def test_loss_counts_only_valid_targets() -> None:
    with open_context():
        batch = microbatch(30)
        valid = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.5
        logits = (torch.randn(30, 2, CONFIG.vocab_size) * 20).requires_grad_()
        reference = logits.detach().clone().double().requires_grad_()
        loss = summed_cross_entropy(logits * 1.0, batch.labels[0], valid)
        expected = nn.functional.cross_entropy(reference.transpose(0, 1)[valid], batch.labels[0][valid], reduction="sum")
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-6)
        loss.backward()
        expected.backward()
        assert logits.grad is not None and reference.grad is not None
        torch.testing.assert_close(logits.grad.double(), reference.grad, atol=1e-6, rtol=1e-5)
        assert (logits.grad.transpose(0, 1)[~valid] == 0).all()
