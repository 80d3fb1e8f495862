"""`python -m train` with an evaluator that does something terrible at a chosen moment: for tests that start it in processes of its own.

evaluation.evaluators=[faulty] evaluation.faulty.{rank, step, what, moment, seconds}; what: raise | kill | hang | stop | terminate

moment: evaluation | gradients (before they are reduced in the step after) | commit (of the next checkpoint). With FAULTY_START=N in the
environment rank N sleeps before it meets the others.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parallel.megatron import engine
from train.checkpoint.checkpointer import Checkpointer
from train.evaluation import Evaluator, Measured, register_evaluator


@dataclass(frozen=True)
class Faulty(Evaluator):
    """Harmless on other ranks and after other steps than these."""

    rank: int = 0
    step: int = 2
    what: str = "raise"
    seconds: float = 120.0
    moment: str = "evaluation"

    def evaluate(self, run: Measured, step: int) -> Mapping[str, float]:
        if (run.layout.rank, step) == (self.rank, self.step):
            if self.moment == "evaluation":
                self.strike()
            if self.moment == "gradients":
                engine.finalize_model_grads = self.strike_in(engine.finalize_model_grads)
            if self.moment == "commit":
                Checkpointer.poll = self.strike_in(Checkpointer.poll)  # type: ignore[method-assign]
        return {"eval/zero": 0.0}

    def strike_in(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*given: Any, **named: Any) -> Any:
            self.strike()
            return function(*given, **named)

        return struck

    def strike(self) -> None:
        if self.what == "raise":
            raise ValueError("the sky is falling")
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.what == "hang":
            print("hanging", flush=True)
            time.sleep(self.seconds)
        if self.what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)


register_evaluator("faulty", Faulty)

if __name__ == "__main__":
    if os.environ.get("FAULTY_START") == os.environ.get("RANK", "0"):
        time.sleep(120)
    from train.__main__ import main

    raise SystemExit(main())
