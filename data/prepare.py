"""Writes Megatron's indexed dataset from text: PREFIX.bin, PREFIX.idx, and PREFIX.json, which notes the tokenizer.

    python -m data.prepare input=texts/ tokenizer=bytes to=prepared/texts
    python -m data.prepare input='dump/*.jsonl.zst' tokenizer=tokenizer.json end_of_document='</s>' to=prepared/dump

input: whatever a recipe's source may be: a file, a directory, a glob, corpus:austen, stdlib. tokenizer: `bytes` or a tokenizer.json.
text_key: of JSONL lines. Every document is closed by the end-of-document id.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.documents import DataError, documents_of
from data.indexed import SUFFIXES, Writer, token_dtype
from data.source import Progress, facts_path, tokenised
from data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer

KEYS = {"input": None, "to": None, "tokenizer": "bytes", "end_of_document": "<|endoftext|>", "text_key": "text"}


def prepare(source: str, tokenizer: Tokenizer, prefix: Path, *, text_key: str = "text") -> str:
    """Writes the pair and returns a line about it. Raises DataError when something is in the way or the text cannot be read."""
    for path in (*(Path(f"{prefix}{suffix}") for suffix in SUFFIXES), facts_path(prefix)):
        if path.exists():
            raise DataError(f"to={str(prefix)!r} exists already ({path}): choose another prefix, or remove it")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(source)
    end = np.array([tokenizer.end_of_document])

    def documents() -> Iterator[np.ndarray]:
        for ids in tokenised(documents_of(source, text_key), tokenizer, progress):
            yield np.concatenate((ids, end))

    with Writer(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for document in documents():
            writer.add(document)
    partial = facts_path(prefix).with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"tokenizer": tokenizer.key, "source": source}) + "\n")
    partial.replace(facts_path(prefix))
    return progress.summary()


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    values = dict(KEYS)
    try:
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if not equals or key not in KEYS:
                raise DataError(f"{argument!r} is unknown here: the keys are {', '.join(KEYS)}, as in input=texts/ to=prepared/texts")
            values[key] = value
        source, to, name = values["input"], values["to"], values["tokenizer"]
        if not source or not to or not name:
            raise DataError(
                "input=..., to=... and tokenizer=... are needed: python -m data.prepare input=texts/ tokenizer=bytes to=prepared/texts"
            )
        tokenizer = ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name), str(values["end_of_document"]))
        line = prepare(source, tokenizer, Path(to), text_key=str(values["text_key"]))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{to}.bin and .idx: {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
