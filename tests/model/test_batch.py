"""What a microbatch knows: identity of tokens and which targets count."""

import dataclasses

import torch

from tests.model.build import microbatch


def test_keys_name_the_rows_of_a_sequence_first_operand() -> None:
    batch = microbatch(6, 3)
    sample, position = batch.sample.expand(6, 3), torch.arange(6)[:, None].expand(6, 3)
    keys = batch.keys(0, 6)
    assert torch.equal(keys.sample, sample.flatten()) and torch.equal(keys.position, position.flatten())
    late = batch.keys(4, 2)  # the second rank's part of a split sequence
    assert torch.equal(late.position, position[4:].flatten()) and torch.equal(late.sample, sample[4:].flatten())


def test_valid_targets_of_each_depth() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32)
    mask = torch.tensor([[True, True, False, True, False, True]])
    batch = dataclasses.replace(microbatch(6, 1, documents=documents), loss_mask=mask)
    assert batch.loss_valid(0).tolist() == mask.tolist()
    # Depth k at t is wanted where t + k exists, is in t's document, and its own next token counts.
    assert batch.loss_valid(1).tolist() == [[True, False, False, False, False, False]]
    assert batch.loss_valid(2).tolist() == [[False] * 6]
    assert batch.loss_counts(2).tolist() == [4, 1, 0]
    unpacked = dataclasses.replace(batch, documents=torch.zeros_like(documents), reset=False)
    assert unpacked.loss_valid(2).tolist() == [[False, True, False, True, False, False]]
