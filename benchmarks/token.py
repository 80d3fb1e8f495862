"""What the next token of a text costs, by how long the text already is: CPU time, and the bytes its cache holds.

    python -m benchmarks.token                                             # Mamba layers alone, attention alone, and both; 64 to 16k tokens
    python -m benchmarks.token rounds=50 to=docs/generation/token.json picture=docs/generation/token.png

Models of `tiny`'s sizes in fp32, without training, one thread. The texts are random and of all lengths at once; a round is one more token of each,
taken back, so that lengths take turns. The least of all rounds counts, for whatever else the machine does only adds.
"""

import time
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt

from benchmarks.arguments import main
from benchmarks.timing import keep_freed_memory, machine, save, table
from model.hybrid import HybridModel
from parallel import groups
from train.build import build_model
from train.generation.speaks import Untrained, following
from train.generation.texts import read
from train.recipe.load import load_recipe
from train.report import drawing

PATTERNS = {"Mamba alone": "MEMEME", "attention alone": "*E*E*E", "tiny": "MEM*EME"}


def built(pattern: str) -> HybridModel:
    """On this rank, until `groups.shutdown`."""
    recipe = load_recipe("tiny", "precision=fp32", f"model.pattern={pattern}")
    _, (model,) = build_model(recipe, groups.initialize(recipe.parallel, recipe.run.seed))
    return model.eval()


@torch.inference_mode()
def by_length(pattern: str, lengths: list[int], rounds: int) -> tuple[dict[int, float], dict[int, int]]:
    """Seconds of a token and bytes of its cache, by the tokens before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        speaker = Untrained(built(pattern))
        draw = torch.Generator().manual_seed(1)
        caches = {}
        for length in lengths:
            _, caches[length] = read(speaker, torch.randint(speaker.vocabulary, (length,), generator=draw).tolist(), 0)
            caches[length].revocable = caches[length].singly = True
        least = dict.fromkeys(lengths, float("inf"))
        for _ in range(rounds + 1):
            for length, cache in caches.items():
                begin = time.process_time()
                speaker.model.hidden(following(speaker, torch.zeros(1, 1, dtype=torch.int64), cache, [0]))
                least[length] = min(least[length], time.process_time() - begin)
                cache.accept([0])
        return least, {length: cache.bytes() for length, cache in caches.items()}
    finally:
        groups.shutdown()
        torch.set_num_threads(threads)


def draw(values: dict[str, Any], path: Path) -> None:
    with plt.rc_context(drawing.STYLE):
        figure, both = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
        for name, colour in zip(values["models"], drawing.RUN_COLOURS, strict=False):
            for axes, what, scale in zip(both, ("seconds", "bytes"), (1e3, 2**-10), strict=True):
                found = values["models"][name][what]
                lengths, numbers = list(found), [value * scale for value in found.values()]
                axes.plot(lengths, numbers, "o-", color=colour)
                axes.annotate(name, (lengths[-1], numbers[-1]), xytext=(7, 0), textcoords="offset points", color=colour, va="center")
        for axes in both:
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
            axes.margins(x=0.22)
            axes.set_xlabel("tokens before it")
        both[0].set_ylim(bottom=0)
        both[1].set_yscale("log", base=2)
        both[0].set_title("CPU time of the next token, ms")
        both[1].set_title("Its cache, KiB")
        drawing.save(figure, path)


def run(lengths: list[int], rounds: int, to: str, picture: str) -> None:
    models: dict[str, dict[str, dict[int, float] | dict[int, int]]] = {}
    print(f"The next token, fp32, {machine(torch.device('cpu'))}; the least of {rounds} rounds in turns")
    for name, pattern in PATTERNS.items():
        seconds, sizes = by_length(pattern, lengths, rounds)
        models[name] = {"seconds": seconds, "bytes": sizes}
        rows = [("tokens before", "CPU time", "bytes")]
        rows += [(f"{length:,}", f"{seconds[length] * 1e3:.3f} ms", f"{sizes[length]:,}") for length in lengths]
        print(f"\n{name}, model.pattern={pattern}\n{table(rows)}", flush=True)
    values = {"machine": machine(torch.device("cpu")), "models": models}
    save(to, values)
    if picture:
        draw(values, Path(picture))


DEFAULTS = {"lengths": [64, 256, 1024, 4096, 16384], "rounds": 30, "to": "", "picture": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
