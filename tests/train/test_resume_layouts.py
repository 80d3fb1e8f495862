"""Any layout goes on from any other, through the command line: see `tests/layouts/reshard.py`."""

from pathlib import Path

import pytest

from tests.layouts.cases import Case
from tests.layouts.reshard import PAIRS, goes_on

slow = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs lie that several pairs begin with."""
    return tmp_path_factory.mktemp("reshard")


@pytest.mark.parametrize(
    ("source", "target"), [pytest.param(*pair, marks=slow, id=" -> ".join(f"{one.ranks}: {one.name}" for one in pair)) for pair in PAIRS]
)
def test_a_run_goes_on_in_another_layout(source: Case, target: Case, place: Path) -> None:
    assert goes_on(place, PAIRS.index((source, target)), source, target)["problems"] == []


def test_pairs_reach_every_axis_from_every_other() -> None:
    assert len(PAIRS) == len({(one.name, other.name) for one, other in PAIRS}) >= 30
    assert all(one.name != other.name for one, other in PAIRS)
    axes = {"tensor", "expert", "expert_tensor", "pipeline", "virtual_pipeline", "context", "distributed_optimizer", "overlap_param_gather"}
    for side in zip(*PAIRS, strict=True):
        assert axes <= {key for case in side for key in case.parallel}
