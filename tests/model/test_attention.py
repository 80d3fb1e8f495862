"""Grouped-query attention against transformers' NemotronH and against its own documents run alone."""

import pytest
import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention

from model.attention import Attention, AttentionSizes
from parallel.shards import pieces_of
from tests.model.build import CONFIG, disturb, microbatch, open_context, packed


@pytest.mark.parametrize("length", [1, 50])
def test_equals_nemotron_h_with_gradients(length: int) -> None:
    with open_context() as context:
        ours = Attention(context, "m")
        disturb(ours)
        sizes = CONFIG.sizes(AttentionSizes)
        config = NemotronHConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.hidden_size,
            layers_block_type=["full_attention"],
            num_attention_heads=sizes.attention_heads,
            num_key_value_heads=sizes.key_value_heads,
            head_dim=sizes.head_dim,
        )
        config._attn_implementation = "eager"
        theirs = NemotronHAttention(config, layer_idx=0)
        state = {p.name.removeprefix("m."): w.detach()[p.local] for w in ours.parameters() for p in pieces_of(w)}
        theirs.load_state_dict(state, strict=True)
        x = torch.randn(length, 2, CONFIG.hidden_size, requires_grad=True)
        x_theirs = x.detach().transpose(0, 1).contiguous().requires_grad_()
        y = ours(x, microbatch(length))
        causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
        expected, _ = theirs(x_theirs, attention_mask=causal)
        torch.testing.assert_close(y.transpose(0, 1), expected, atol=1e-5, rtol=1e-5)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy.transpose(0, 1))
        assert x.grad is not None and x_theirs.grad is not None
        torch.testing.assert_close(x.grad.transpose(0, 1), x_theirs.grad, atol=1e-5, rtol=1e-5)


def test_packed_documents_equal_each_document_alone() -> None:
    length = 70
    with open_context() as context:
        mixer = Attention(context, "m")
        disturb(mixer)
        documents = packed(length)
        x = torch.randn(length, 2, CONFIG.hidden_size)
        together = mixer(x, microbatch(length, documents=documents))
        for row in range(2):
            for ordinal in documents[row].unique():
                where = documents[row] == ordinal
                alone = mixer(x[where, row : row + 1], microbatch(int(where.sum()), 1))
                torch.testing.assert_close(alone[:, 0], together[where, row], atol=2e-6, rtol=1e-5)


def test_is_causal() -> None:
    with open_context() as context:
        mixer = Attention(context, "m")
        x = torch.randn(20, 2, CONFIG.hidden_size)
        changed = x.clone()
        changed[12] += 1
        before, after = (mixer(value, microbatch(20)) for value in (x, changed))
        assert torch.equal(before[:12], after[:12])
        assert (before[12:] != after[12:]).any(-1).all()
