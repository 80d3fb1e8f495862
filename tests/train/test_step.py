"""Sample order and loss normalisation: pure functions, so tested without a model."""

import torch

from train.step import BatchPlan, loss_weights


def test_every_layout_sees_the_same_samples_in_a_step() -> None:
    whole = BatchPlan(global_batch_size=24, micro_batch_size=24, data_rank=0, data_size=1)
    assert whole.samples(5) == [range(120, 144)]
    for data_size in (1, 2, 3, 4):
        for micro in (1, 2, 3):
            if 24 % (data_size * micro):
                continue
            plans = [BatchPlan(24, micro, rank, data_size) for rank in range(data_size)]
            order = [i for plan in plans for part in plan.samples(5) for i in part]
            assert order == list(range(120, 144))
            assert all(plan.microbatches == len(plan.samples(5)) == 24 // (data_size * micro) for plan in plans)


def test_loss_weights_average_each_depth_over_its_own_tokens() -> None:
    counts = torch.tensor([100, 90, 80])
    sums = torch.tensor([200.0, 270.0, 320.0])
    total = (sums * loss_weights(counts, mtp_loss_scale=0.3)).sum()
    torch.testing.assert_close(total, torch.tensor(2.0 + 0.3 * (3.0 + 4.0) / 2))


def test_a_depth_without_valid_tokens_weighs_nothing() -> None:
    weights = loss_weights(torch.tensor([0, 4, 0]), mtp_loss_scale=0.3)
    assert weights.tolist()[0] == 0.0 and weights.tolist()[2] == 0.0
    torch.testing.assert_close(weights[1], torch.tensor(0.3 / 2 / 4))
