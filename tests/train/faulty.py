"""`python -m train` with an evaluator that does something terrible at a chosen moment: for tests that start it in processes of its own.

evaluation.evaluators=[faulty] evaluation.faulty.{rank, step, what}; what: raise | kill | hang | terminate
"""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from train.evaluation import Measured, register_evaluator


@dataclass(frozen=True)
class Faulty:
    """Harmless on other ranks and after other steps than these."""

    rank: int = 0
    step: int = 2
    what: str = "raise"
    seconds: float = 120.0

    def evaluate(self, run: Measured, step: int) -> Mapping[str, float]:
        if (run.layout.rank, step) == (self.rank, self.step):
            if self.what == "raise":
                raise ValueError("the sky is falling")
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            if self.what == "hang":
                print("hanging", flush=True)
                time.sleep(self.seconds)
        return {"eval/zero": 0.0}


register_evaluator("faulty", Faulty)

if __name__ == "__main__":
    from train.__main__ import main

    raise SystemExit(main())
