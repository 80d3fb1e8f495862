"""When a run is killed, and who of it: the moments a journey draws from.

What a moment is looked for by stands in `probe/sitecustomize.py`: audit events of the interpreter for what is done to files, calls for the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

STEP = "train.training:train_step"
STEP_DIRECTORY = r"step-\d{8}"
WRITTEN = rf"{STEP_DIRECTORY}\.partial"
COMMITTED = ("os.rename", rf"{WRITTEN} \S*{STEP_DIRECTORY} ")
DELETED = ("os.rename", rf"{STEP_DIRECTORY} \S*{WRITTEN} ")
FIRST_RANK = ("rank", "other", "all", "launcher", "everything")


@dataclass(frozen=True)
class Moment:
    """trigger: draws what the probe looks for. when: first start, a start in the middle, or the one that may finish the run. first_rank: only rank 0
    passes there. alone: whether a run of one rank passes there."""

    name: str
    trigger: Callable[[Random], dict[str, Any]]
    when: str = "middle"
    first_rank: bool = False
    alone: bool = True


def _events(*events: tuple[str, str], upto: int = 1, wait: float = 0.0) -> Callable[[Random], dict[str, Any]]:
    """upto: the count is drawn from 1 ... upto; wait: seconds, of which up to so many are drawn."""
    return lambda random: {"events": [list(event) for event in events], "count": random.randint(1, upto), "wait": random.uniform(0, wait)}


def _call(name: str, first: int = 1, last: int = 1, **given: Any) -> Callable[[Random], dict[str, Any]]:
    """given: options of the probe; of a pair of numbers, one in between is drawn."""

    def draw(random: Random) -> dict[str, Any]:
        options = {key: random.uniform(*value) if isinstance(value, tuple) else value for key, value in given.items()}
        return {"call": name, "count": random.randint(first, last), **options}

    return draw


LOCK = ("open", r"/lock ")
MOMENTS = (
    # start-up
    Moment("start-up: at a random time", lambda random: {"seconds": random.uniform(0.05, 9)}),
    Moment("start-up: before the lock is taken", _events(LOCK, ("fcntl.flock", "")), first_rank=True),
    Moment("start-up: the lock taken, its owner not written", _events(LOCK, ("socket.gethostname", "")), first_rank=True),
    Moment("start-up: the first recipe is stored", _events(("os.rename", r"recipe\.yaml\.partial")), "first", True),
    Moment("start-up: the tokenizer is stored", _events(("open", r"facts\.json\.partial")), "first", True),
    # restoring
    Moment("restore: checksums are compared", _events(("open", rf"{STEP_DIRECTORY}/rank-.* r"))),
    Moment("restore: before tensors are filled", _call("train.checkpoint.reader:Checkpoint.load_into")),
    Moment("restore: metrics.jsonl is cut", _events(("open", r"metrics\.jsonl\.new")), first_rank=True),
    Moment("restore: before the cut metrics.jsonl gets its name", _events(("os.rename", r"metrics\.jsonl\.new")), first_rank=True),
    # steps
    Moment("step: at a random time", _call(STEP, 1, 4, timer=(0.01, 0.6))),
    Moment("step: others wait in a collective", _call("torch.distributed:all_reduce", 10, 90, wait=(0.2, 0.6)), alone=False),
    Moment("step: a line of metrics is half written", _call("train.observe.metrics:encode_line", 2, 5, torn=True), first_rank=True),
    # evaluation
    Moment("evaluation: at a random time", _call("train.training:measure", timer=(0.01, 0.4))),
    Moment("evaluation: others wait in a collective", _call("train.training:measure", wait=(0.1, 0.4)), alone=False),
    # saving
    Moment("save: it begins", _events(("os.mkdir", rf"{WRITTEN}"), upto=2), first_rank=True),
    Moment("save: files are written, training goes on", _events(("open", rf"{WRITTEN}/rank-"), upto=2, wait=0.7)),
    Moment("save: written, not committed", _call(STEP, 1, 2, partial=True, wait=(0.0, 0.2))),
    Moment("commit: the manifest is written", _events(("open", rf"{WRITTEN}/manifest"), upto=2, wait=0.3), first_rank=True),
    Moment("commit: before the rename", _events(COMMITTED, upto=2), first_rank=True),
    Moment("commit: after the rename", _events(COMMITTED, ("*", ""), upto=2), first_rank=True),
    Moment("commit: an older checkpoint is deleted", _events(DELETED, ("*", "")), first_rank=True),
    # the end
    Moment("end: the last checkpoint is complete", _events(("os.rename", r"finished\.json\.partial")), "last", True),
    Moment("end: the lock is given back", _events(("os.remove", r"/lock ")), "last", True),
)


@dataclass(frozen=True)
class Blow:
    """A kill that was drawn."""

    moment: str
    rank: int
    victims: str
    trigger: dict[str, Any]


def draw(moment: Moment, ranks: int, random: Random) -> Blow:
    """Who looks for the moment, and who is killed then."""
    rank = 0 if moment.first_rank else random.randrange(ranks)
    victims = "rank" if ranks == 1 else random.choice(("rank", "rank", *FIRST_RANK))
    if moment.name.startswith("step: a line"):
        victims = "rank" if ranks == 1 else random.choice(("rank", "all", "everything"))  # nobody writes on behind half a line
    return Blow(moment.name, rank, victims, moment.trigger(random))


def deck(ranks: int, random: Random) -> list[Moment]:
    """Every moment a run of so many ranks passes, in a random order."""
    cards = [moment for moment in MOMENTS if moment.alone or ranks > 1]
    random.shuffle(cards)
    return cards
