"""Fuzzes one parser for a while, with atheris (pip install atheris).

    python -m tests.fuzz manifest seconds=1800 corpus=.cache/fuzz/manifest

A crash is any exception its parser does not promise, a minute for one input, or 2.5 GiB of memory; libFuzzer then writes the input to crash-* in
the corpus' directory, and it becomes a test in tests/fuzz/test_hostile.py. Inputs that reached new code stay in the corpus, so a second run goes on
where the first ended.
"""

import sys
from pathlib import Path

import atheris

INSTRUMENTED = ["data", "train.checkpoint", "train.recipe", "train.observe.metrics", "train.arguments", "yaml", "json", "omegaconf"]

with atheris.instrument_imports(include=INSTRUMENTED):
    from tests.fuzz.targets import TARGETS, seeds


def main(arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    name, *rest = arguments
    values = dict(argument.split("=", 1) for argument in rest)
    corpus = Path(values.get("corpus", f".cache/fuzz/{name}"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = ["-len_control=0", "-timeout=60", "-rss_limit_mb=2560", "-max_len=8192", f"-max_total_time={values.get('seconds', '1800')}"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, f"-artifact_prefix={corpus}/"], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
