"""`python -m train` in which loading, saving and evaluating take longer, and the loss of some samples is not a number: for tests of where the time
went. INJECTED in the environment names a file that gets a line [category, seconds] for every delay, once it is over; `bad_samples` are the only
fault.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.text_data import TextData
from tests.train.incidents_runs import exploding_loss
from train import loop, training
from train.build import Run, build
from train.checkpoint.writer import Draft

LOADING, SAVING, EVALUATING = 0.03, 0.7, 1.5  # seconds more for a microbatch, a checkpoint, an evaluation
BAD_STEP = 25  # from 1: the loss of its first sample is NaN


def after(category: str, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
    def delayed(*given: Any, **named: Any) -> Any:
        begin = time.monotonic()
        time.sleep(seconds)
        with Path(os.environ["INJECTED"]).open("a") as file:
            file.write(json.dumps([category, time.monotonic() - begin]) + "\n")
        return function(*given, **named)

    return delayed


def built(*given: Any, **named: Any) -> Run:
    run = build(*given, **named)
    exploding_loss([run.plan.samples(BAD_STEP - 1)[0][0]], math.nan)(run)
    return run


if __name__ == "__main__":
    TextData.batch = after("data", LOADING, TextData.batch)  # type: ignore[method-assign]
    Draft.write = after("checkpoint", SAVING, Draft.write)  # type: ignore[method-assign]
    training.measure = after("evaluation", EVALUATING, training.measure)
    loop.build = built
    from train.__main__ import main

    raise SystemExit(main())
