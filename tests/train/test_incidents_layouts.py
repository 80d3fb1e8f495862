"""Numbers that go wrong under every kind of parallelism: the step is skipped on all ranks, the fault is named where it is, the run goes back to what
it would have been, and ranks that are sound are never told apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.layouts.cases import MATRIX, Case
from tests.train import incidents_runs as runs
from tests.train.test_incidents import SHORT, alerts, curve, reports, same_end
from train.checkpoint.reader import open_checkpoint

TENSOR, EXPERT, PIPELINE = "parallel.tensor=2", "parallel.expert=2", "parallel.pipeline=2"
SHARDED = "parallel.distributed_optimizer=true"
BAD = [47, 55]  # of steps 6 and 7, in the second half of each

TIMEOUT = 280.0  # seconds

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(600)


def rewound(world: int, fault: str, arguments: tuple[Any, ...], layout: tuple[str, ...], tmp_path: Path, ranks: Any) -> dict[str, Any]:
    """What the report says of a run that met this fault twice in a row and went back; it ends as the run that never saw those samples."""
    overrides = (*SHORT, *layout, "monitor.incidents.skips=2", "monitor.replicas.every=1", "monitor.stragglers.steps=0")
    assert ranks(world)(runs.on_ranks, tmp_path / "run", world, overrides, fault, arguments, timeout=TIMEOUT) == [0] * world
    assert ranks(world)(runs.on_ranks, tmp_path / "sound", world, overrides, "skipping", ([(40, 56)],), timeout=TIMEOUT) == [0] * world
    assert curve(tmp_path / "run") == curve(tmp_path / "sound")
    assert same_end(tmp_path / "run", tmp_path / "sound")
    assert open_checkpoint(tmp_path / "run").state["incidents"]["skipped_samples"] == [[40, 56]]
    assert [a["kind"] for a in alerts(tmp_path / "run")] == ["skipped", "skipped", "not finite", "rewind"]
    (report,) = reports(tmp_path / "run")
    assert report["steps"] == [6, 7] and report["samples"] == [[40, 56]] and report["reproduced"]
    return dict(report["first_not_finite"])


@pytest.mark.parametrize(
    "world, rank, layout",
    [
        (2, 1, (EXPERT, SHARDED)),
        pytest.param(2, 1, (EXPERT,), marks=slow),
        pytest.param(4, 3, (TENSOR, EXPERT, SHARDED), marks=slow),
    ],
)
def test_a_nan_in_one_experts_gradient(world: int, rank: int, layout: tuple[str, ...], tmp_path: Path, ranks: Any) -> None:
    found = rewound(world, "nan_in_an_experts_gradient", (BAD, 3), layout, tmp_path, ranks)
    assert found["what"] == "the gradient of layers.1.mixer.experts.3.up_proj.weight"
    assert (found["phase"], found["module"], found["rank"]) == ("backward", "layers.1.mixer.experts", rank)
    assert 55 in found["samples"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, rank, module, layout",
    [
        (2, 1, "layers.6.mixer.experts", (PIPELINE,)),
        pytest.param(2, 1, "layers.0.mixer.in_proj", (TENSOR,), marks=slow),
        pytest.param(2, 0, "layers.0.mixer.in_proj", (PIPELINE,), marks=slow),
        pytest.param(4, 3, "layers.6.mixer.shared_experts.up_proj", (TENSOR, PIPELINE), marks=slow),
    ],
)
def test_a_nan_in_the_output_of_one_rank(world: int, rank: int, module: str, layout: tuple[str, ...], tmp_path: Path, ranks: Any) -> None:
    found = rewound(world, "nan_in_an_output", (BAD, module, rank), layout, tmp_path, ranks)
    assert (found["phase"], found["module"], found["rank"]) == ("forward", module, rank)
    assert 55 in found["samples"]


@pytest.mark.parametrize(
    "world, rank, name, layout, said",
    [
        (2, 1, "layers.0.norm.weight", (TENSOR,), "differs between ranks 0, 1, of which no majority agrees"),
        (3, 1, "layers.0.mixer.in_proj.weight", (SHARDED,), "on rank 1 differs from most of ranks 0, 1, 2"),
        pytest.param(4, 3, "layers.0.norm.weight", (TENSOR, EXPERT), "on rank 3 differs from most of ranks 1, 2, 3", marks=slow),
        pytest.param(4, 2, "layers.1.mixer.experts.up_proj", (EXPERT,), "differs between ranks 0, 2, of which", marks=slow),
        pytest.param(4, 3, "norm_f.weight", (PIPELINE,), "differs between ranks 2, 3, of which", marks=slow),
    ],
)
def test_a_flipped_bit(world: int, rank: int, name: str, layout: tuple[str, ...], said: str, tmp_path: Path, ranks: Any) -> None:
    size = 2 * world
    overrides = (
        *("train.steps=8", f"train.global_batch_size={size}", "train.micro_batch_size=1", "checkpoint.every=4"),
        *(*layout, "monitor.replicas.every=1"),
    )
    assert ranks(world)(runs.on_ranks, tmp_path / "run", world, overrides, "flip_a_bit", (rank, name, 5), timeout=TIMEOUT) == [1] * world
    (report,) = reports(tmp_path / "run")
    assert report["steps"] == [5, 5]
    assert said in report["cause"]
    assert open_checkpoint(tmp_path / "run").step == 4


USUAL = ({"tensor": 2, "expert": 2}, {"distributed_optimizer": True})


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=() if case.parallel in USUAL else slow) for case in MATRIX if case.usual]
)
def test_sound_replicas_are_never_told_apart(case: Case, tmp_path: Path, ranks: Callable[..., Any]) -> None:
    world = case.ranks
    overrides = (
        "train.steps=4",
        "checkpoint.every=2",
        *case.overrides,
        "monitor.replicas.every=1",
        "monitor.stragglers.steps=0",
        "precision=nvfp4_1d",
    )
    assert ranks(world)(runs.on_ranks, tmp_path / "run", world, overrides, "", (), timeout=TIMEOUT) == [0] * world
    assert alerts(tmp_path / "run") == []
