"""What drafts cost and bring: tokens a CPU second of one text with speculative.depth 1 to 6 against none, in turns in one run, on one thread.

    python -m benchmarks.speculative models=[runs/tiny]                    # a run: what its heads' drafts bring
    python -m benchmarks.speculative models=[runs/tiny,small,wide] to=docs/generation/speculative.json picture=docs/generation/speculative.png

models: runs; or recipes, and `wide`, which is `small` with four times the width, without training: their drafts are hardly ever right, so that
what is measured of them is the cost alone. A round is a pass of the model over 1 + depth tokens and `depth` drafts; its cost is counted in passes
over one token. Drafts pay where a round gives more tokens than it costs passes.

round: its seconds, over those of a token without drafts. check: the pass of it alone. needed: of the drafts, how many must be accepted, were that
the same at every depth, for a round to be worth its cost. take back: what it takes to return to an accepted token with every state kept, against
one more pass over the accepted tokens, which would make the states again.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.arguments import main
from benchmarks.timing import keep_freed_memory, machine, save, table
from model.cache import MambaState
from model.layer import Layer
from parallel import groups
from train.build import build_model
from train.checkpoint.reader import open_checkpoint
from train.generation.acceptance import Acceptance
from train.generation.sampling import Sampling
from train.generation.speaker import open_speaker
from train.generation.speaks import Speaks, Untrained, following, head
from train.generation.texts import generate, read
from train.recipe.load import load_recipe
from train.report import drawing

WIDE = (
    "model.hidden_size=1024",
    "model.attention_heads=16",
    "model.key_value_heads=4",
    "model.head_dim=64",
    "model.mamba_heads=64",
    "model.mamba_head_dim=32",
    "model.latent_size=512",
    "model.expert_ffn_size=1024",
    "model.shared_expert_ffn_size=2048",
)
PROMPT = "It is a truth universally acknowledged, that"


@contextmanager
def opened(name: str) -> Iterator[tuple[Speaks, list[int]]]:
    """A model that makes text, and a prompt."""
    try:
        if Path(name).is_dir():
            trained = open_speaker(open_checkpoint(name), "fp32")
            yield trained, trained.tokenizer.encode(PROMPT).tolist()
            return
        recipe = load_recipe("small" if name == "wide" else name, "precision=fp32", *(WIDE if name == "wide" else ()))
        _, (model,) = build_model(recipe, groups.initialize(recipe.parallel, recipe.run.seed))
        yield Untrained(model.eval()), torch.randint(recipe.model.vocab_size, (44,), generator=torch.Generator().manual_seed(1)).tolist()
    finally:
        groups.shutdown()


def seconds_of(speaker: Speaks, prompt: Sequence[int], tokens: int, sampling: Sampling, depth: int) -> tuple[float, Acceptance]:
    """Seconds a token behind the first, which the prompt gives."""
    acceptance = Acceptance.none(1, depth)
    turns = generate(speaker, [prompt], tokens, sampling, depth=depth, acceptance=acceptance)
    next(turns)
    begin = time.process_time()
    for _ in turns:
        pass
    return (time.process_time() - begin) / (tokens - 1), acceptance


@torch.inference_mode()
def passes(speaker: Speaks, prompt: Sequence[int], depths: int, rounds: int) -> tuple[dict[int, float], dict[str, float], int]:
    """Seconds of a pass over so many tokens; of taking two of three back, and of making their states again; bytes of one state of all layers."""
    _, cache = read(speaker, prompt, 0)
    cache.revocable = cache.singly = True

    def read_on(count: int) -> None:
        microbatch = following(speaker, torch.full((1, count), prompt[0]), cache, [0])
        head(speaker, speaker.model.hidden(microbatch), microbatch)

    def again(count: int) -> None:
        read_on(count)
        cache.accept([0])

    checks: dict[int, list[float]] = {count: [] for count in range(1, depths + 2)}
    back: dict[str, list[float]] = {"take back": [], "make again": []}
    for _ in range(rounds):
        for count, seconds in checks.items():
            begin = time.process_time()
            again(count)
            seconds.append(time.process_time() - begin)
        read_on(3)
        begin = time.process_time()
        cache.accept([1])
        middle = time.process_time()
        read_on(1)
        back["take back"].append(middle - begin)
        back["make again"].append(time.process_time() - middle)
        cache.accept([0])
    mixers = [layer.mixer for layer in speaker.model.layers.values() if isinstance(layer, Layer) and layer.kind.letter == "M"]
    states = [cache.of(mixer, lambda: MambaState(torch.empty(0))).state for mixer in mixers]
    state_bytes = sum(state.numel() * state.element_size() for state in states if state is not None)
    return (
        {count: statistics.median(seconds) for count, seconds in checks.items()},
        {name: statistics.median(values) for name, values in back.items()},
        state_bytes,
    )


def needed(cost: float, depth: int) -> float:
    """p with 1 + p + ... + p^depth = cost; above 1 where no p suffices."""
    low, high = 0.0, 2.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(depth + 1)) < cost else (low, middle)
    return high


def measure(name: str, depths: int, tokens: int, rounds: int, temperature: float) -> dict[str, Any]:
    with opened(name) as (speaker, prompt):
        parameters = sum(parameter.numel() for parameter in speaker.model.parameters())
        sampling = Sampling(temperature=temperature, seed=1)
        taken: dict[int, list[float]] = {depth: [] for depth in range(depths + 1)}
        accepted = {}
        for index in range(rounds + 1):
            for depth in taken:
                seconds, accepted[depth] = seconds_of(speaker, prompt, tokens, sampling, depth)
                if index:
                    taken[depth].append(seconds)
        checks, back, state = passes(speaker, prompt, depths, 10 * rounds)
    plain = statistics.median(taken[0])
    by_depth = []
    for depth in range(1, depths + 1):
        seconds, length = statistics.median(taken[depth]), accepted[depth].length()
        cost = seconds * length / plain
        by_depth.append(
            {
                "depth": depth,
                "tokens_per_second": 1 / seconds,
                "speed": plain / seconds,
                "length": length,
                "accepted": accepted[depth].by_depth(),
                "round": cost,
                "check": checks[depth + 1] / checks[1],
                "needed": needed(cost, depth),
            }
        )
    return {
        "name": Path(name).name,
        "trained": Path(name).is_dir(),
        "parameters": parameters,
        "tokens_per_second": 1 / plain,
        "depths": by_depth,
        "take_back_seconds": back["take back"],
        "make_again_seconds": back["make again"],
        "state_bytes": state,
    }


def told(found: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("depth", "tokens/CPU s", "against none", "tokens a round", "round", "check", "needed")]
    rows.append(("0", f"{found['tokens_per_second']:,.1f}", "1.00x", "1.00", "1.00", "1.00", ""))
    for each in found["depths"]:
        numbers = [f"{each[key]:.2f}" for key in ("length", "round", "check")]
        share = f"{each['needed']:.0%}" if each["needed"] <= 1 else "never"
        rows.append((str(each["depth"]), f"{each['tokens_per_second']:,.1f}", f"{each['speed']:.2f}x", *numbers, share))
    deepest = found["depths"][-1]["accepted"]
    lines = [
        f"{found['name']}, {found['parameters'] / 1e6:,.1f}M parameters with MTP{'' if found['trained'] else ', untrained: costs alone'}",
        "",
        table(rows),
        "",
    ]
    if found["trained"]:
        shares = ", ".join(f"{share:.0%}" for share in deepest if share == share)
        lines.append(f"Drafts accepted of depth 1, 2, ..., where all before were: {shares}.")
    lines.append(
        f"To take back: {found['take_back_seconds'] * 1e3:.3f} ms with the states kept, {found['state_bytes'] / 1024:,.0f} KiB a token; "
        f"to make them again: {found['make_again_seconds'] * 1e3:.2f} ms."
    )
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    with plt.rc_context(drawing.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
        ends: dict[Axes, list[tuple[float, str, str]]] = {left: [], right: []}
        for found, colour in zip(results, drawing.RUN_COLOURS, strict=False):
            depths = [each["depth"] for each in found["depths"]]
            name = found["name"] if found["trained"] else f"{found['name']}, untrained"
            for axes, key, style, what in (
                (left, "speed", "o-", ""),
                (right, "round", "o-", ": cost"),
                (right, "length", "s--", ": tokens"),
            ):
                if key == "length" and not found["trained"]:
                    continue
                values = [each[key] for each in found["depths"]]
                axes.plot(depths, values, style, color=colour)
                ends[axes].append((values[-1], name + what, colour))
        left.axhline(1, color="#555555", linewidth=1)
        left.set_title("Tokens per CPU second, against no drafts")
        right.set_title("What a round costs, in passes, and gives, in tokens")
        for axes in (left, right):
            axes.set_xlabel("speculative.depth")
            axes.set_ylim(bottom=0)
            axes.set_xticks(depths)
            drawing.label_ends(axes, ends[axes])
        drawing.save(figure, path)


def run(models: list[str], depths: int, tokens: int, rounds: int, temperature: str, to: str, picture: str) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    print(f"One text of {tokens} tokens, fp32, {machine(torch.device('cpu'))}; medians of {rounds} rounds in turns")
    results = []
    for name in models:
        results.append(measure(name, depths, tokens, rounds, float(temperature)))
        print(f"\n{told(results[-1])}", flush=True)
    save(to, {"machine": machine(torch.device("cpu")), "tokens": tokens, "rounds": rounds, "models": results})
    if picture:
        draw(results, Path(picture))


DEFAULTS = {"models": ["small"], "depths": 6, "tokens": 100, "rounds": 3, "temperature": "0", "to": "", "picture": ""}

if __name__ == "__main__":
    raise SystemExit(main(run, DEFAULTS, None))
