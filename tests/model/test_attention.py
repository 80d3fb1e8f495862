"""Grouped-query attention against transformers' NemotronH and against its own documents run alone."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention

from model.attention import Attention, AttentionSizes
from model.batch import Bounds
from model.causal import causal_attention
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


class Largest(TorchDispatchMode):
    """elements: of the largest tensor made inside; names: of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        self.elements = max([self.elements, *(each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor))])
        return result


@pytest.mark.parametrize("length", [70, 512])
def test_packed_documents_equal_a_mask_without_making_one(length: int) -> None:
    batch, heads, kv_heads, width = 2, 4, 2, 8
    documents = packed(length) if length < 512 else (torch.arange(length).expand(batch, -1) // 64).int()
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(length, batch, n, width, generator=generator, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    inputs = made[0], made[1], made[2]
    dy = torch.randn(length, batch, heads, width, generator=generator)
    with Largest() as largest:
        out = causal_attention(*inputs, Bounds.of(documents))
        gradients = torch.autograd.grad(out, inputs, dy)
    query, key, value = (each.detach().double().permute(1, 2, 0, 3).requires_grad_() for each in inputs)
    mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out.double(), exact.permute(2, 0, 1, 3), rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(exact, (query, key, value), dy.double().permute(1, 2, 0, 3))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.permute(2, 0, 1, 3), rtol=1e-5, atol=2e-6)
    if length == 512:  # no tensor is larger than the queries
        assert largest.elements <= dy.numel() < batch * length * length // 8


def test_a_gpu_gets_all_documents_in_one_call() -> None:
    """Shapes, dtypes and the choice alone: on a pretended device nothing is computed."""
    bounds = Bounds.of(packed(64))
    with FakeTensorMode(), Largest() as ops, torch.no_grad():
        query, key = (torch.empty(64, 2, heads, 16, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
        starts = torch.empty(len(bounds.lengths) + 1, dtype=torch.int32, device="cuda")
        on_device = replace(bounds, starts=starts)
        out = causal_attention(query, key, key, on_device)
        assert (out.shape, out.dtype, out.device.type) == (query.shape, torch.bfloat16, "cuda")
    assert any("_varlen_attn" in name for name in ops.names)
