"""Multi-token prediction: causality, shared and separate blocks, documents kept apart."""

from collections.abc import Iterator

import pytest
import torch

from model.config import ModelConfig
from model.hybrid import HybridModel
from parallel.shards import pieces_of
from tests.model.build import disturb, microbatch, open_context, packed

CONFIG = ModelConfig.of(
    pattern="ME*-/*E/*E",
    vocab_size=64,
    hidden_size=32,
    attention_heads=4,
    key_value_heads=2,
    head_dim=8,
    mamba_heads=8,
    mamba_head_dim=8,
    mamba_state_size=16,
    mamba_groups=2,
    ffn_hidden_size=48,
    experts=4,
    top_k=2,
    latent_size=16,
    expert_ffn_size=32,
    shared_expert_ffn_size=32,
    init_std=0.1,
)


@pytest.fixture(params=[True, False], ids=["shared", "separate"])
def model(request: pytest.FixtureRequest) -> Iterator[HybridModel]:
    config = CONFIG.changed(mtp_shared=request.param)
    with open_context(config=config) as context:
        made = HybridModel(context)
        disturb(made)
        yield made.eval()


def test_depth_k_sees_tokens_up_to_t_plus_k(model: HybridModel) -> None:
    batch = microbatch(24)
    with torch.no_grad():
        before = model.logits(batch)
        for place in (0, 9, 23):
            tokens = batch.tokens[0].clone()
            tokens[:, place] = (tokens[:, place] + 1) % CONFIG.vocab_size
            after = model.logits(microbatch(24, tokens=tokens))
            for depth, (old, new) in enumerate(zip(before, after, strict=True)):
                changed = (old - new).abs().amax((0, 2)) > 0
                first = max(place - depth, 0)
                assert not changed[:first].any(), f"depth {depth} looks ahead"
                assert changed[first], f"depth {depth} does not see token {place}"


def test_blocks_on_disk(model: HybridModel) -> None:
    names = {piece.name for param in model.parameters() for piece in pieces_of(param)}
    blocks = {name.split(".")[2] for name in names if name.startswith("mtp.")}
    assert blocks == ({"0"} if model.context.config.mtp_shared else {"0", "1"})


def test_packed_documents_have_the_losses_of_each_document_alone(model: HybridModel) -> None:
    length = 40
    documents = packed(length)
    same = documents[:, 1:] == documents[:, :-1]
    batch = microbatch(length, documents=documents, loss_mask=torch.nn.functional.pad(same, (0, 1)))
    model.train()
    together = model(batch).detach()
    alone = torch.zeros_like(together)
    for row in range(2):
        for ordinal in documents[row].unique():
            where = documents[row] == ordinal
            size = int(where.sum())
            if size == 1:
                continue  # no target of its own
            mask = torch.ones(1, size, dtype=torch.bool)
            mask[0, -1] = False  # the target of a document's last token is another document's
            alone += model(
                microbatch(
                    size,
                    1,
                    tokens=batch.tokens[0, row : row + 1, where],
                    labels=batch.labels[0, row : row + 1, where],
                    loss_mask=mask,
                    sample=batch.sample[row : row + 1],
                )
            ).detach()
    torch.testing.assert_close(together, alone, rtol=2e-6, atol=2e-5)
    counts = batch.loss_counts()
    assert counts[0] > counts[1] > counts[2] > 0


def test_losses_are_those_of_the_logits(model: HybridModel) -> None:
    batch = microbatch(24)
    model.train()
    sums = model(batch).detach()
    with torch.no_grad():
        for depth, logits in enumerate(model.logits(batch)):
            valid = batch.loss_mask[depth]
            labels = torch.roll(batch.labels[0], -depth, 1)
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
            torch.testing.assert_close((losses * valid).sum(), sums[depth], rtol=1e-5, atol=1e-4)
