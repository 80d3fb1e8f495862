"""What a microbatch knows: where its tokens are, what lies ahead of them, and which targets count."""

import dataclasses

import pytest
import torch

from parallel.layout import Layout, ParallelConfig
from tests.model.build import microbatch


def test_keys_name_the_rows_of_a_sequence_first_operand() -> None:
    batch = microbatch(6, 3)
    sample, position = batch.sample.expand(6, 3), torch.arange(6)[:, None].expand(6, 3)
    keys = batch.keys(batch.positions)
    assert torch.equal(keys.sample, sample.flatten()) and torch.equal(keys.position, position.flatten())


@pytest.mark.parametrize(("sequence", "expected"), [(True, [4, 5, 6, 7]), (False, [0, 1, 2, 3, 4, 5, 6, 7])])
def test_a_rank_knows_the_positions_of_its_own_tokens(sequence: bool, expected: list[int]) -> None:
    layout = dataclasses.replace(Layout.alone(ParallelConfig(tensor=2, sequence=sequence)), tensor_size=2, tensor_rank=1)
    batch = microbatch(8)
    assert batch.own_positions(layout).tolist() == expected
    assert batch.own_positions(Layout.alone()).tolist() == batch.positions.tolist() == list(range(8))
    # Positions, not places in what a rank holds: a batch that starts later in its sample says so.
    late = dataclasses.replace(batch, positions=batch.positions + 100)
    assert late.own_positions(layout).tolist() == [100 + place for place in expected]
    assert late.keys(late.positions).position[0] == 100


def test_every_depth_has_the_tokens_and_labels_ahead() -> None:
    batch = microbatch(6, 2)
    sequence = torch.cat((batch.tokens[0], batch.labels[0][:, -1:]), dim=1)  # [batch, 7]
    for depth in range(3):
        for place in range(6):
            for values, ahead in ((batch.tokens, depth), (batch.labels, depth + 1)):
                inside = place + ahead < (6 if values is batch.tokens else 7)
                expected = sequence[:, place + ahead] if inside else torch.zeros(2, dtype=torch.int64)
                assert torch.equal(values[depth, :, place], expected)
    assert microbatch(6, depths=0).tokens.shape == (1, 2, 6)


def test_valid_targets_of_each_depth() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32)
    mask = torch.tensor([[True, True, False, True, False, True]])
    batch = microbatch(6, 1, documents=documents, loss_mask=mask)
    assert batch.loss_mask[0].tolist() == mask.tolist()
    # Depth k at t is wanted where t + k exists, is in t's document, and its own next token counts.
    assert batch.loss_mask[1].tolist() == [[True, False, False, False, False, False]]
    assert batch.loss_mask[2].tolist() == [[False] * 6]
    assert batch.loss_counts().tolist() == [4, 1, 0]
    unpacked = microbatch(6, 1, loss_mask=mask)
    assert unpacked.loss_mask[2].tolist() == [[False, True, False, True, False, False]]
