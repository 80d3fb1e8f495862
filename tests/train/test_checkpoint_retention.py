"""Which checkpoints stay: the newest, every so many steps, and milestones for ever."""

import itertools
from pathlib import Path

import pytest

from tests.train.recipes import recipe
from tests.train.test_checkpoint import simple, steps
from train import loop
from train.checkpoint.reader import Checkpoint
from train.checkpoint.retention import Listed, Retention, superfluous
from train.checkpoint.writer import save


def listed(*checkpoints: int, damaged: tuple[int, ...] = (), milestones: tuple[int, ...] = ()) -> list[Listed]:
    return [Listed(step, step not in damaged, "50%" if step in milestones else None) for step in checkpoints]


@pytest.mark.parametrize(
    "found, retention, newest, gone",
    [
        (listed(1, 2, 3), Retention(None), None, set()),
        (listed(1, 2, 3), Retention(0), None, set()),
        (listed(3, 1, 2), Retention(2), None, {1}),
        (listed(1, 2, 3), Retention(5), None, set()),
        (listed(10, 20, 30, 40, 50), Retention(1, keep_every=20), None, {10, 30}),
        (listed(10, 20, 30, 40, 50, milestones=(10,)), Retention(1), None, {20, 30, 40}),
        (listed(10, 20, 30, 40, damaged=(30,)), Retention(2), None, {10}),  # 40 and 20 are the newest that can be read
        (listed(10, 20, 30, 40, damaged=(10, 40)), Retention(1), None, {10, 20}),  # what is newer may be repaired, or is being written
        (listed(10, 20, 30, 40), Retention(1), 20, {10}),  # a future that was abandoned neither counts nor goes
        (listed(20, 30, damaged=(20,)), Retention(1), None, set()),  # nothing goes before there are more than so many
        ([], Retention(1), None, set()),
    ],
)
def test_what_may_go(found: list[Listed], retention: Retention, newest: int | None, gone: set[int]) -> None:
    assert superfluous(found, retention, newest) == gone


def test_saves_one_by_one_leave_what_the_rule_says() -> None:
    """After each of many saves, of any recipe: the newest, the multiples and the milestones, and nothing else."""
    for keep, every, marked in itertools.product((1, 2, 3), (0, 4, 6), ((), (3, 5))):
        stay: list[Listed] = []
        for step in range(1, 20):
            stay.append(Listed(step, True, "here" if step in marked else None))
            gone = superfluous(stay, Retention(keep, every), step)
            stay = [entry for entry in stay if entry.step not in gone]
            expected = {s for s in range(1, step + 1) if s > step - keep or (every and s % every == 0) or s in marked}
            assert {entry.step for entry in stay} == expected


def test_a_milestone_stays_whatever_later_saves_say(tmp_path: Path) -> None:
    save(tmp_path, 1, simple(), {"milestone": "10%"})
    for step in (2, 3, 4, 5):
        save(tmp_path, step, simple(), {}, retention=Retention(1, keep_every=3))
    assert steps(tmp_path) == ["step-00000001", "step-00000003", "step-00000005"]
    assert Checkpoint(tmp_path / "step-00000001").milestone == "10%"
    assert Checkpoint(tmp_path / "step-00000003").milestone is None


def test_a_run_saves_what_is_to_stay(tmp_path: Path, alone: None) -> None:
    given = ("precision=fp32", "train.steps=9", "optimizer.warmup=1", "optimizer.decay=2", f"run.dir={tmp_path}")
    asked = ("checkpoint.every=2", "checkpoint.keep=1", "checkpoint.keep_every=3", "checkpoint.milestones=[5steps,80%,512 tokens]")
    assert loop.run(recipe(*given, *asked)) == 0
    found = {path.name: Checkpoint(path).milestone for path in sorted((tmp_path / "checkpoints").iterdir())}
    assert found == {
        "step-00000001": "512 tokens",  # of 8 x 64
        "step-00000003": None,
        "step-00000005": "5 steps",
        "step-00000006": None,
        "step-00000007": "80%",
        "step-00000009": None,
    }
