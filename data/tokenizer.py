"""Tokenizers: bytes, any Hugging Face tokenizer.json, or a byte-level BPE trained on the sources."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.config import TokenizerConfig
from data.documents import DataError


class Tokenizer(Protocol):
    """vocab_size: number of ids. end_of_document: the id appended to every document. key: identifies it in caches."""

    vocab_size: int
    end_of_document: int
    key: str

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, for transformers' PreTrainedTokenizerFast."""


def _byte_alphabet() -> list[str]:
    """The printable character byte-level tokenizers of the `tokenizers` library write for each byte value."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # One character per byte: any valid UTF-8 text maps byte by byte, so the 256 symbols can be read off texts that contain them all.
    alphabet: dict[int, str] = {}
    for code in (*range(0x800), *range(0x800, 0x110000, 0x400)):
        if 0xD800 <= code < 0xE000:
            continue
        character = chr(code)
        pieces = "".join(piece for piece, _ in byte_level.pre_tokenize_str(character))
        alphabet.update(zip(character.encode(), pieces, strict=True))
    # Bytes that UTF-8 never uses take the remaining symbols of the library's alphabet.
    left = iter(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(alphabet.values())))
    return [alphabet[value] if value in alphabet else next(left) for value in range(256)]


def _write_config(directory: Path, end_of_document: str) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_document, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class ByteTokenizer:
    """Ids 0 ... 255 are bytes, 256 ends a document."""

    vocab_size = 257
    end_of_document = 256
    key = "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        vocabulary = {symbol: value for value, symbol in enumerate(_byte_alphabet())}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        tokenizer.save(str(directory / "tokenizer.json"))
        _write_config(directory, "<|endoftext|>")


class FileTokenizer:
    """A Hugging Face tokenizer.json; special tokens are never added, `end_of_document` names the token that ends documents."""

    def __init__(self, path: Path, end_of_document: str):
        if not path.is_file():
            raise DataError(f"data.tokenizer.path={str(path)!r} does not exist: give the path of a tokenizer.json")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"data.tokenizer.path={str(path)!r} is no tokenizer.json ({error}): save one with the tokenizers library") from None
        found = self.tokenizer.token_to_id(end_of_document)
        if found is None:
            raise DataError(
                f"data.tokenizer.end_of_document={end_of_document!r} is no token of {path}: name the token that ends a document there"
            )
        self.name, self.end_of_document = end_of_document, found
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.key = hashlib.sha256(path.read_bytes()).hexdigest()[:16] + f"-{found}"

    def encode(self, text: bytes) -> np.ndarray:
        ids = self.tokenizer.encode(text.decode(), add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        self.tokenizer.save(str(directory / "tokenizer.json"))
        _write_config(directory, self.name)


def train_bpe(texts: Iterable[bytes], vocab_size: int, end_of_document: str) -> tokenizers.Tokenizer:
    """A byte-level BPE of exactly these texts; deterministic."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode() for text in texts), trainer)
    return tokenizer


def open_tokenizer(config: TokenizerConfig, texts: Iterable[bytes], cache: Path) -> Tokenizer:
    """texts: what a BPE is trained on, read only when it is not in the cache."""
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "file":
        assert config.path
        return FileTokenizer(Path(config.path).expanduser(), config.end_of_document)
    assert config.vocab_size
    held = list(texts)
    digest = hashlib.sha256(f"bpe/{config.vocab_size}/{config.end_of_document}".encode())
    for text in held:
        digest.update(hashlib.sha256(text).digest())
    path = cache / f"bpe-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        train_bpe(held, config.vocab_size, config.end_of_document).save(str(partial))
        os.replace(partial, path)
    return FileTokenizer(path, config.end_of_document)
