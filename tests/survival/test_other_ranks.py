"""A run that is killed and goes on with another number of ranks, through the real launchers, again and again."""

from pathlib import Path

import pytest

from tests.survival.journey import LITTLE, STEPS, Kind, newest, notes, numbers, run_once
from tests.survival.moments import STEP, Blow

# At tiny's own learning rate these few steps have no warm-up: Adam's first updates make rounding differences of small gradients as large as the
# learning rate, and rows of the embedding come near zero, where the norm's backward pass divides by their size. One rank with another micro-batch
# size is then 1.5e-4 from itself in one step's gradient norm; with these it stays within 2e-7, so a difference here is the layout's.
FP32 = (*LITTLE, "precision=fp32", "optimizer.warmup=4", "optimizer.learning_rate=1e-3", "optimizer.min_learning_rate=1e-5")
ALONE = Kind("1 rank", 1, "python", FP32)
STAGES = (
    ALONE,
    Kind("tensor 2", 2, "torchrun", (*FP32, "parallel.tensor=2")),
    Kind("data 2 x expert 2", 4, "local", (*FP32, "parallel.expert=2", "parallel.distributed_optimizer=true")),
    ALONE,
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_rank_then_two_then_four_then_one(tmp_path: Path) -> None:
    for name in ("whole", "changing"):
        (tmp_path / name).mkdir()
    whole, changing = tmp_path / "whole" / "run", tmp_path / "changing" / "run"
    assert run_once(ALONE, tmp_path / "whole", whole, 0, None).status == 0
    for number, kind in enumerate(STAGES):
        last = number == len(STAGES) - 1
        blow = None if last else Blow("in its fourth step", 0, "everything" if kind.ranks > 1 else "rank", {"call": STEP, "count": 4})
        start = run_once(kind, tmp_path / "changing", changing, number, blow)
        assert (start.status == 0) == last, start.output
        assert last or 2 * (number + 1) <= newest(changing) < STEPS - 1, start.output

    ours, theirs = numbers(changing), numbers(whole)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        for key in (
            "loss/lm",
            "loss/mtp_1",
            "loss/mtp_2",
            "grad_norm",
            "learning_rate",
            *(key for key in other if key.startswith("eval/")),
        ):
            assert mine[key] == pytest.approx(other[key], rel=2e-6), f"step {mine['step']}, {key}"
    # Each step's samples were read by the ranks together, each once by those that hold the same part of the model.
    size = STEPS * 8
    starts = {step: max(note["start"] for note in notes(tmp_path / "changing") if note["step"] == step) for step in range(STEPS)}
    read = [note for note in notes(tmp_path / "changing") if note["start"] == starts[note["step"]]]
    assert {index for note in read for index in note["samples"]} == set(range(size))
    windows = {index: tuple(window) for note in read for index, window in zip(note["samples"], note["windows"], strict=True)}
    assert windows == {i: tuple(w) for note in notes(tmp_path / "whole") for i, w in zip(note["samples"], note["windows"], strict=True)}
    assert all(note["step"] == index // 8 for note in read for index in note["samples"])
