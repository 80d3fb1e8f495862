"""`python -m tests.train.incidents_killed RUN_DIR MOMENT`: a run that meets NaN losses in steps 6 and 7, goes back to the checkpoint of step 3, and
is killed at this moment of it; "none" kills it never, and "spared" passes over the samples it would have gone back for from the start."""

import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from tests.train import incidents_runs as runs

OVERRIDES = ("train.steps=12", "checkpoint.every=3", "monitor.incidents.skips=2", "monitor.incidents.rewinds=1")

MOMENTS: dict[str, tuple[str, str, bool]] = {
    "the report is begun": ("open", r"incidents/step-0*7(-\d)?\.json w", False),
    "the report is half written": ("open", r"incidents/step-0*7(-\d)?\.md", False),
    "metrics.jsonl is cut": ("os.rename", r"metrics\.jsonl\.new", True),
    "history.jsonl is written": ("open", r"history\.jsonl a\+", True),
    "the checkpoint is written again": ("open", r"step-00000003\.partial/rank-", True),
    "the old checkpoint makes room": ("os.rename", r"step-00000003\.partial \S*step-00000003 ", True),
    "the new one has its name": ("os.rename", r"step-00000003\.old \S*step-00000003\.old\.partial", True),
}
"""(audit event, what its arguments match, whether it counts only once the report is written)"""


def die(event: str, pattern: str, late: bool, run_dir: Path) -> None:
    """Kills this process before such an event."""

    def reports() -> set[tuple[str, int]]:
        # A run killed after its report finds the same incident again and may write it under the same name.
        return {(path.name, path.stat().st_mtime_ns) for path in (run_dir / "incidents").glob("*.md")}

    def hear(heard: str, arguments: tuple[Any, ...]) -> None:
        if heard == event and re.search(pattern, " ".join(map(str, arguments))) and (not late or reports() - before):
            os.kill(os.getpid(), signal.SIGKILL)

    before = reports()
    sys.addaudithook(hear)


if __name__ == "__main__":
    place, moment = Path(sys.argv[1]), sys.argv[2]
    if moment in MOMENTS:
        die(*MOMENTS[moment], place)
    fault = runs.skipping([(40, 56)]) if moment == "spared" else runs.exploding_loss([41, 49], math.nan)
    raise SystemExit(runs.run(place, *OVERRIDES, fault=fault))
