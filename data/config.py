"""The recipe's `data` group."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TokenizerConfig:
    """The recipe's `data.tokenizer` group."""

    kind: Literal["bytes", "file", "bpe", "numbers"] = "bytes"
    """bytes: 257 ids, 256 bytes and end of document; file: a Hugging Face tokenizer.json; bpe: byte-level merges trained on the sources of the
    first phase; numbers: ids written as decimal numbers with spaces between, for tasks that have no text, 0 ends a document."""
    path: str | None = None
    """Of the tokenizer.json of kind file."""
    vocab_size: int | None = None
    """Ids of kind bpe, at least 258, or of kind numbers."""
    end_of_document: str = "<|endoftext|>"
    """The token of kind file that ends a document."""

    def known_vocab_size(self) -> int | None:
        """Number of ids where it is known without opening a file."""
        return 257 if self.kind == "bytes" else self.vocab_size if self.kind in ("bpe", "numbers") else None


@dataclass(frozen=True)
class SourceConfig:
    """One source of a blend."""

    path: str
    """A text file (.txt, .md, .py, ...), .jsonl, either of them .gz or .zst, a directory, a glob, a prefix of Megatron's .bin/.idx pair,
    corpus:austen or corpus:jargon (shipped), stdlib (the running Python's standard library), or a task whose sequences are
    computed: mqar:LENGTHxPAIRS (see `data.mqar`), ruler:niah_single_1 and others (see `data.needle`), or
    pairs:number:LENGTH and others (see `data.pairs`)."""
    weight: float = 1.0
    """Share of the blend, relative to the other sources."""
    text_key: str = "text"
    """Where the text stands in a JSONL line."""


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of the run with a blend of its own."""

    blend: tuple[SourceConfig, ...]
    """The sources that are mixed, sample by sample."""
    tokens: int | None = None
    """Length of the phase in tokens; null: until the end of the run (the last phase only)."""


@dataclass(frozen=True)
class DataConfig:
    """The recipe's `data` group."""

    phases: tuple[PhaseConfig, ...] = ()
    """Stretches of the run, one after the other, each with a blend of its own; at least one."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """From text to tokens."""
    validation: Literal["tail", "documents"] = "tail"
    """What is held out: tail, the last part of every document; documents, whole documents, chosen by the seed."""
    validation_fraction: float = 0.05
    """Share of the text that is held out; 0: none."""
    reset_at_document: bool = False
    """Whether state, convolution and attention stop at a document's end inside a sequence."""
    alternate_length: int | None = None
    """Every other step cuts its sequences into pieces of so many tokens that are kept apart: long and short batches take turns; null: none does."""
    cache: str = ".cache/data"
    """Directory for tokenised text, which several runs share."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence naming the key."""
        tokenizer = self.tokenizer
        if tokenizer.kind == "file" and not tokenizer.path:
            raise ValueError("data.tokenizer.path is missing: data.tokenizer.kind=file needs the path of a tokenizer.json")
        if tokenizer.kind == "bpe" and (tokenizer.vocab_size is None or tokenizer.vocab_size < 258):
            raise ValueError(
                f"data.tokenizer.vocab_size={tokenizer.vocab_size} is too small: a byte-level BPE needs at least 258 (256 bytes, end of "
                "document, one merge)"
            )
        if tokenizer.kind == "numbers" and (tokenizer.vocab_size is None or tokenizer.vocab_size < 2):
            raise ValueError(
                f"data.tokenizer.vocab_size={tokenizer.vocab_size} is too small: data.tokenizer.kind=numbers needs the number of ids, 2 or more"
            )
        if not self.phases:
            raise ValueError("data.phases is empty: give at least one phase with a blend, or choose a group such as data=austen")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction={self.validation_fraction} must lie in [0, 1): use for instance 0.05")
        if self.alternate_length is not None and self.alternate_length < 1:
            raise ValueError(f"data.alternate_length={self.alternate_length} must be at least 1: use null for sequences of one length")
        for index, phase in enumerate(self.phases):
            key = f"data.phases[{index}]"
            last = index == len(self.phases) - 1
            if phase.tokens is None and not last:
                raise ValueError(f"{key}.tokens is missing: only the last phase may go on until the end")
            if phase.tokens is not None and phase.tokens < 1:
                raise ValueError(f"{key}.tokens={phase.tokens} must be positive")
            if not phase.blend:
                raise ValueError(f"{key}.blend is empty: list at least one source")
            for place, source in enumerate(phase.blend):
                if not source.path:
                    raise ValueError(f"{key}.blend[{place}].path is empty: name a file, a directory or corpus:austen")
                if not 0 <= source.weight < float("inf"):
                    raise ValueError(f"{key}.blend[{place}].weight={source.weight} must be a number from 0 up")
            if not sum(source.weight for source in phase.blend) > 0:
                raise ValueError(f"{key}.blend has only zero weights: give some source a positive weight")
            paths = [source.path for source in phase.blend]
            twice = next((path for path in paths if paths.count(path) > 1), None)
            if twice is not None:
                raise ValueError(f"{key}.blend names {twice!r} twice: add its weights up in one entry")
