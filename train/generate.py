"""Makes text with a checkpoint.

python -m train.generate checkpoint=runs/tiny prompt="It is a truth" tokens=200 temperature=0.8 top_p=0.95 seed=1
python -m train.generate checkpoint=runs/tiny prompts=prompts.txt tokens=100 to=texts.jsonl

prompts: a file with a prompt a line. tokens: at most so many more (200). temperature (1): 0 takes the likeliest token. top_p (1): of the likeliest
tokens, as few as have this probability together. stop: a text, or a list of them, at which one ends. precision: fp32 or bf16, by default bf16 on a
GPU. weights: stored, or rounded, to the number formats in which the run multiplied them. speculative.depth: tokens that multi-token prediction
drafts for the model to check in one pass (0: none); the text stays the same. to: a file that gets one JSON object a prompt. One prompt alone is
printed as it grows.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from parallel import groups
from parallel.layout import world_size
from train.arguments import key_values
from train.checkpoint.reader import open_checkpoint
from train.generation.acceptance import Acceptance
from train.generation.drafter import check_depth
from train.generation.sampling import Sampling
from train.generation.speaker import Speaker, open_speaker
from train.generation.text import Text
from train.generation.texts import generate
from train.refusal import refuse

KEYS = (
    "checkpoint",
    "prompt",
    "prompts",
    "tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "precision",
    "weights",
    "to",
    "speculative.depth",
)


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        if "--help" in arguments or "-h" in arguments:
            print(__doc__)
            return 0
        if world_size() > 1:
            raise ValueError("texts are made by one process: start python -m train.generate without a launcher")
        values = key_values(arguments, KEYS)
        path = _one(values, "checkpoint", str, None)
        prompts, tokens = _prompts(values), _one(values, "tokens", int, 200)
        if tokens < 1:
            raise ValueError(f"tokens={tokens} must be at least 1")
        numbers = {key: _one(values, key, (int, float), 1.0) for key in ("temperature", "top_p")}
        sampling = Sampling(**numbers, seed=_one(values, "seed", int, 1))
        stops = tuple(map(str, given if isinstance(given := values.get("stop", []), list) else [given]))
        if "" in stops:
            raise ValueError("stop='' is empty: give a text at which to stop, or leave it out")
        to = Path(_one(values, "to", str, "")) if "to" in values else None
        if to is not None:  # what cannot be written is said before anything is made
            to.parent.mkdir(parents=True, exist_ok=True)
            to.touch()
        precision = _one(values, "precision", str, "bf16" if torch.cuda.is_available() else "fp32")
        speaker = open_speaker(open_checkpoint(path), precision, _one(values, "weights", str, "stored"))
        depth = _one(values, "speculative.depth", int, 0)
        check_depth(speaker, depth)
        acceptance = Acceptance.none(len(prompts), depth)
        texts = [Text(speaker.tokenizer, prompt, stops) for prompt in prompts]
        start = time.perf_counter()
        if len(texts) == 1:
            print(texts[0].prompt, end="", flush=True)
        for new in _made(speaker, texts, tokens, sampling, acceptance):
            if len(texts) == 1:
                print(new, end="", flush=True)
        seconds = time.perf_counter() - start
        _tell(texts, seconds)
        if depth:
            print(f"[{acceptance}]", file=sys.stderr)
        if to is not None:
            _write(to, texts)
    except (ValueError, OSError) as error:
        return refuse(str(error))
    finally:
        groups.shutdown()
    return 0


def _made(speaker: Speaker, texts: Sequence[Text], tokens: int, sampling: Sampling, acceptance: Acceptance) -> Iterator[str]:
    """What each token adds to a text, until all have ended."""
    end = speaker.tokenizer.end_of_document
    # A text without a beginning begins where a document does.
    prompts = [speaker.tokenizer.encode(text.prompt).tolist() or [end] for text in texts]
    for chosen in generate(speaker, prompts, tokens, sampling, end=end, depth=acceptance.depth, acceptance=acceptance):
        for text, token in zip(texts, chosen, strict=True):
            if token is not None and not text.ended:
                yield text.add(token)
        if all(text.ended for text in texts):
            break
    for text in texts:
        yield text.finish()


def _tell(texts: Sequence[Text], seconds: float) -> None:
    if len(texts) == 1:
        print()
    else:
        for number, text in enumerate(texts, start=1):
            print(f"--- {number} of {len(texts)} ({text.ended})\n{text.prompt}{text.more}")
    count = sum(len(text.ids) for text in texts)
    ended = f", ended by {texts[0].ended}" if len(texts) == 1 else f" in {len(texts)} texts"
    print(f"[{count} tokens{ended}; {count / max(seconds, 1e-9):,.1f} tokens/s, prompts included]", file=sys.stderr)


def _write(to: Path, texts: Sequence[Text]) -> None:
    lines = [{"prompt": text.prompt, "text": text.more, "tokens": len(text.ids), "ended": text.ended} for text in texts]
    to.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _one(values: dict[str, Any], key: str, kind: Any, default: Any) -> Any:
    """One value. Raises ValueError where it is missing, or of another kind."""
    value = values.get(key, default)
    if value is None:
        raise ValueError(f"{key}=... is missing: python -m train.generate checkpoint=runs/tiny prompt='It is a truth'")
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = {str: "a text", int: "a whole number"}.get(kind, "a number")
        raise ValueError(f"{key}={value} is not {wanted}")
    return value


def _prompts(values: dict[str, Any]) -> list[str]:
    if ("prompt" in values) == ("prompts" in values):
        raise ValueError("give either prompt=... (a text) or prompts=... (a file with a prompt a line)")
    if "prompt" in values:
        return [str(values["prompt"])]
    path = Path(_one(values, "prompts", str, None))
    try:
        lines = [line for line in path.read_text().splitlines() if line]
    except FileNotFoundError:
        raise ValueError(f"prompts={path} does not exist: give a file with a prompt a line") from None
    except UnicodeDecodeError:
        raise ValueError(f"prompts={path} is not UTF-8 text: give a file with a prompt a line") from None
    if not lines:
        raise ValueError(f"prompts={path} holds no prompt: give a file with a prompt a line")
    return lines


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
