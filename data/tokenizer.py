"""Tokenizers: bytes, any Hugging Face tokenizer.json, a byte-level BPE trained on the sources, or plain numbers.

Special tokens are ids nobody can type: text that happens to spell `<|endoftext|>` is encoded like any other text. The one special id that
data know is the end of a document, appended to every training document and named explicitly.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.cache import cached
from data.config import TokenizerConfig
from data.documents import DataError
from data.indexed import token_dtype

END_OF_DOCUMENT = "<|endoftext|>"
LARGEST_VOCABULARY = 1 << 24


class Tokenizer(Protocol):
    """vocab_size: number of ids. end_of_document: the id appended to every document. key: identifies the tokenizer in caches."""

    vocab_size: int
    end_of_document: int
    key: str

    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids of UTF-8 text, uint16 or int32 [tokens], without special ones."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def byte_length(self, ids: np.ndarray) -> int:
        """Bytes of text these ids stand for."""

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, for transformers' PreTrainedTokenizerFast."""


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers: itself where Latin-1 prints it, else the next one from U+0100 on.

    The map is GPT-2's, and every byte-level tokenizer.json since uses it.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _save(tokenizer: tokenizers.Tokenizer, directory: str | Path, end_of_document: str) -> None:
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_document, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class ByteTokenizer:
    """Ids 0 ... 255 are bytes, 256 ends a document."""

    vocab_size = 257
    end_of_document = 256
    key = "bytes"

    def encode(self, text: bytes | str) -> np.ndarray:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def byte_length(self, ids: np.ndarray) -> int:
        return int((np.asarray(ids) < 256).sum())

    def save(self, directory: str | Path) -> None:
        vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
        _save(tokenizer, directory, END_OF_DOCUMENT)


class FileTokenizer:
    """A Hugging Face tokenizer.json; special tokens are never added, `end_of_document` names the token that ends documents."""

    def __init__(self, path: Path, end_of_document: str):
        if not path.is_file():
            raise DataError(f"data.tokenizer.path={str(path)!r} does not exist: give the path of a tokenizer.json")
        try:
            raw = path.read_bytes()
            self.tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except BaseException as error:  # the library raises plain Exception, and of its own defects a BaseException that only it knows
            if not _is_the_librarys(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"data.tokenizer.path={str(path)!r} is no tokenizer.json ({reason}): name one that `tokenizers` saved"
            ) from None
        found = self.tokenizer.token_to_id(end_of_document)
        if found is None:
            raise DataError(
                f"data.tokenizer.end_of_document={end_of_document!r} is no token of {path}: name the one that ends a document there"
            )
        self._use(self.tokenizer, raw, end_of_document, int(found))
        if self.vocab_size > LARGEST_VOCABULARY:
            raise DataError(
                f"data.tokenizer.path={str(path)!r} has ids up to {self.vocab_size - 1:,}, which no embedding holds: number them from 0"
            )

    def _use(self, tokenizer: tokenizers.Tokenizer, raw: bytes, name: str, end: int) -> None:
        """raw: the tokenizer.json. name, end: of the token that ends a document."""
        self.tokenizer, self._saved = tokenizer, raw
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.name, self.end_of_document = name, end
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())  # ids may have gaps
        self.key = f"{hashlib.sha256(raw).hexdigest()[:16]}-{end}"
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, text: bytes | str) -> np.ndarray:
        return self.encode_batch([text.encode() if isinstance(text, str) else text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        try:
            encodings = self.tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        except BaseException as error:
            if not _is_the_librarys(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"the tokenizer.json of data.tokenizer cannot encode text ({reason}): use another, or repair it") from None
        ids = [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]
        if any(len(some) and some.max() >= self.vocab_size for some in ids):
            raise DataError("the tokenizer.json of data.tokenizer gives ids that are not in its vocabulary: use another, or repair it")
        return [some.astype(self._dtype) for some in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def byte_length(self, ids: np.ndarray) -> int:
        return len(self.decode(ids.tolist()).encode())

    def save(self, directory: str | Path) -> None:
        _save(tokenizers.Tokenizer.from_buffer(self._saved), directory, self.name)


class NumberTokenizer(FileTokenizer):
    """Ids are written as decimal numbers with spaces between them; 0 ends a document. For tasks that have no text."""

    def __init__(self, vocab_size: int):
        words = {str(number): number for number in range(vocab_size)}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(words))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self._use(tokenizer, tokenizer.to_str().encode(), "0", 0)


def _is_the_librarys(error: BaseException) -> bool:
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def train_bpe(texts: Iterable[bytes], vocab_size: int, end_of_document: str) -> tokenizers.Tokenizer:
    """A byte-level BPE of exactly these texts; deterministic. Fewer than `vocab_size` ids where the texts have no more pairs to merge."""
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


def open_tokenizer(config: TokenizerConfig, cache: Path, texts: Callable[[], Iterable[bytes]], texts_key: str) -> Tokenizer:
    """texts: gives what a BPE is trained on, called only when it is not in the cache under `texts_key`. Raises DataError."""
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "file":
        if not config.path:
            raise DataError("data.tokenizer.path is missing: data.tokenizer.kind=file needs the path of a tokenizer.json")
        return FileTokenizer(Path(config.path).expanduser(), config.end_of_document)
    if not config.vocab_size:
        raise DataError(f"data.tokenizer.vocab_size is missing: data.tokenizer.kind={config.kind} needs the number of ids")
    vocab_size = config.vocab_size
    if config.kind == "numbers":
        return NumberTokenizer(vocab_size)

    def build(directory: Path) -> None:
        train_bpe(texts(), vocab_size, config.end_of_document).save(str(directory / "tokenizer.json"))

    key = hashlib.sha256(repr((texts_key, vocab_size, config.end_of_document)).encode()).hexdigest()[:16]
    return FileTokenizer(cached(cache / f"bpe-{key}", build) / "tokenizer.json", config.end_of_document)
