"""What is fuzzed: each target takes bytes, makes files of them, and reads them as the product does.

A target may raise what its parser promises (one sentence) and nothing else. Inputs are kept from failing early where that would hide the rest: a
manifest gets the checksum it should have, files the sizes and digests their manifest says.
"""

import contextlib
import copy
import hashlib
import json
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from data import indexed
from data.documents import DataError, documents_of
from data.tokenizer import FileTokenizer
from train.arguments import key_values
from train.checkpoint.boxes import Box
from train.checkpoint.manifest import MANIFEST, CheckpointError
from train.checkpoint.parts import Part
from train.checkpoint.reader import Checkpoint
from train.checkpoint.writer import save
from train.observe.metrics import decode_lines
from train.recipe.guard import forbid_environment, read_yaml
from train.recipe.load import RECIPES, base, plain_values, read_recipe
from train.recipe.reading import RecipeError

ROOT = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
PLACE = Path(tempfile.mkdtemp(prefix="fuzz-", dir=ROOT))


def cut(data: bytes) -> tuple[bytes, bytes]:
    """Two inputs of one: the first two bytes say where the first ends."""
    if len(data) < 2:
        return data, b""
    size = struct.unpack("<H", data[:2])[0]
    return data[2 : 2 + size], data[2 + size :]


def index(data: bytes) -> None:
    """A pair of .idx and .bin; most are as large as they say, so that what they say is read."""
    if data and data[0] & 1:
        first, second = cut(data[1:])
    else:
        code, count, bounds = (data[1:4] + bytes(3))[:3]
        count, bounds = count % 16, bounds % 16
        arrays = (data[4:] + bytes(12 * count + 8 * bounds))[: 12 * count + 8 * bounds]
        first = indexed.HEADER.pack(indexed.MAGIC, 1, code % 10, count, bounds) + arrays
        size = int(np.frombuffer(arrays, np.int32, count).sum()) * np.dtype(indexed.DTYPES.get(code % 10, np.uint8)).itemsize
        second = bytes(size) if 0 <= size < 1 << 16 else b"x"
    (PLACE / "x.idx").write_bytes(first)
    (PLACE / "x.bin").write_bytes(second)
    try:
        stream = indexed.read(PLACE / "x")
        for place in range(min(len(stream.lengths), 50)):
            stream.part(place)
        stream.read(0, min(len(stream), 100))
        stream.ordinals(0, min(len(stream), 100))
    except DataError:
        pass


def text(data: bytes) -> None:
    """A text or JSONL file, plain or compressed."""
    suffix = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst")[data[0] % 6 if data else 0]
    path = PLACE / f"x{suffix}"
    path.write_bytes(data[1:])
    try:
        for _ in documents_of(str(path)):
            pass
    except DataError:
        pass


def edited(document: Any, data: bytes) -> Any:
    """A JSON document with a few values replaced, removed or repeated, as the bytes say: its shape survives, which blind mutation breaks."""
    document = json.loads(json.dumps(document))
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**32,
        2**63,
        2**70,
        1e308,
        0.5,
        "",
        "a",
        "../../x",
        "\x00",
        "x" * 300,
        [],
        [[]],
        {},
        {"a": 1},
    ]
    for place in range(0, len(data) - 2, 3):
        node, key = document, None
        path, choice, action = data[place : place + 3]
        for _ in range(6):
            if not isinstance(node, dict | list) or not node:
                break
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, keys[path % len(keys)]
            node, path = node[key], path // len(keys) + choice
            if path % 5 == 0:
                break
        if key is None:
            continue
        if action % 3 == 0:
            del parent[key]
        elif action % 3 == 1:
            parent[key] = copy.deepcopy(values[choice % len(values)])
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[f"{key}x"] = copy.deepcopy(parent[key])
    return document


def tokenizer(data: bytes) -> None:
    """A tokenizer.json, and text it encodes."""
    if data and data[0] & 1:
        shipped = _tokenizers()
        data = json.dumps(edited(shipped[data[0] // 2 % len(shipped)], data[1:])).encode()
    (PLACE / "tokenizer.json").write_bytes(data)
    try:
        made = FileTokenizer(PLACE / "tokenizer.json", "<|endoftext|>")
        made.decode(made.encode("Half a byte is a nibble; ein Nibble ist ein halbes Byte.").tolist())
    except DataError:
        pass


def _checkpoint() -> Path:
    place = PLACE / "checkpoints" / "step-00000001"
    if not place.exists():
        parts = [
            Part("model/a", (4, 3), Box((0, 0), (4, 3)), torch.arange(12.0).view(4, 3)),
            Part("model/b", (2,), Box((0,), (2,)), torch.ones(2, dtype=torch.bfloat16)),
            Part("step", (), Box((), ()), torch.tensor(7)),
        ]
        save(PLACE / "checkpoints", 1, parts, {"elapsed": 1.0}, tokens=5)
    return place


def _load(place: Path) -> None:
    try:
        checkpoint = Checkpoint(place)
        checkpoint.verify()
        for name in checkpoint.names()[:20]:
            checkpoint.read_full(name)
        checkpoint.load_into([Part("model/a", (4, 3), Box((1, 0), (2, 3)), torch.zeros(2, 3))])
    except CheckpointError:
        pass


def manifest(data: bytes) -> None:
    """A manifest.json with the checksum it should have."""
    place = _checkpoint()
    if not _kept:
        _kept.append(json.loads((place / MANIFEST).read_bytes()))
    content = data
    try:
        document = edited(_kept[0], data[1:]) if data and data[0] == 1 else json.loads(data)
        if isinstance(document, dict):
            document.pop("sha256", None)
            text = json.dumps(document, sort_keys=True, separators=(",", ":"))
            document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
            content = json.dumps(document).encode()
    except (ValueError, RecursionError):
        pass
    (place / MANIFEST).write_bytes(content)
    _load(place)


def safetensors(data: bytes) -> None:
    """A safetensors file with the size and digest that its manifest says."""
    place = _checkpoint()
    whole = json.loads((place / MANIFEST).read_bytes()) if not _kept else _kept[0]
    _kept[:] = [whole]
    document = json.loads(json.dumps(whole))
    (name,) = document["files"]
    if data and data[0] & 1:
        header, body = cut(data[1:])
        data = struct.pack("<Q", len(header)) + header + body
    (place / name).write_bytes(data)
    document["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest(json.dumps(document).encode())


_kept: list[dict] = []


def recipe(data: bytes) -> None:
    """A recipe's YAML, over the shipped `tiny`."""
    forbid_environment()
    try:
        values = read_yaml(data, "the recipe")
        if isinstance(values, dict):
            values.pop("hydra", None)
            values.pop("defaults", None)
            config = OmegaConf.merge(_tiny(), OmegaConf.create(values))
            read_recipe(plain_values(config), 1)  # type: ignore[arg-type]
    except (RecipeError, OmegaConfBaseException):
        pass


def _tiny() -> object:
    if not _kept_tiny:
        parts = [base()]
        for name in ("model/tiny", "data/austen", "precision/nvfp4"):
            group = name.split("/")[0]
            parts.append({group: read_yaml((RECIPES / f"{name}.yaml").read_bytes(), name)})
        whole = read_yaml((RECIPES / "tiny.yaml").read_bytes(), "tiny")
        whole.pop("defaults")
        _kept_tiny.append(OmegaConf.merge(*map(OmegaConf.create, [*parts, whole])))
    return _kept_tiny[0]


_kept_tiny: list[object] = []


def run_files(data: bytes) -> None:
    """metrics.jsonl of a run that is looked at, and the arguments of a command without a recipe."""
    first, second = cut(data)
    with contextlib.suppress(ValueError):
        decode_lines(first)
    with contextlib.suppress(ValueError):
        key_values(second.decode(errors="replace").split("\n"), ("runs", "to"))


@cache
def _tokenizers() -> list[Any]:
    """Small ones of every kind, as JSON."""
    bpe = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "Ġ": 3}, merges=[("a", "b")], fuse_unk=True, unk_token="a"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("a|b+", "isolated"), pre_tokenizers.ByteLevel(use_regex=False)])  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "y")])  # type: ignore[assignment]
    bpe.post_processor = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 4)])  # type: ignore[assignment]
    words = tokenizers.Tokenizer(models.WordLevel(vocab={"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    pieces = tokenizers.Tokenizer(models.WordPiece(vocab={"a": 0, "##b": 1, "<|endoftext|>": 2}, unk_token="a"))
    unigram = tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0), ("<|endoftext|>", -3.0)], unk_id=0, byte_fallback=False))
    made = [bpe, words, pieces, unigram]
    for one in made:
        one.add_special_tokens(["<|endoftext|>"])
    return [json.loads(one.to_str()) for one in made]


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (index, text, tokenizer, manifest, safetensors, recipe, run_files)
}


def seeds(name: str) -> list[bytes]:
    """Valid inputs to begin with."""
    if name == "index":
        with indexed.Writer(PLACE / "s", indexed.token_dtype(300)) as writer:
            for length in (3, 1, 20):
                writer.add(torch.arange(length).numpy())
        idx, tokens = ((PLACE / f"s{suffix}").read_bytes() for suffix in (".idx", ".bin"))
        lengths, bounds = struct.pack("<3i3q", 3, 1, 20, 0, 6, 8), struct.pack("<4q", 0, 1, 2, 3)
        return [b"\1" + struct.pack("<H", len(idx)) + idx + tokens, bytes((0, 8, 3, 4)) + lengths + bounds]
    if name == "text":
        import gzip

        import zstandard

        lines = b'{"text": "one"}\n{"text": "two \\u00e9"}\n'
        squeezed = zstandard.ZstdCompressor().compress
        return [b"\0plain text", b"\1" + lines, b"\2" + gzip.compress(lines), b"\3" + gzip.compress(lines), b"\5" + squeezed(lines)]
    if name == "tokenizer":
        return [json.dumps(document).encode() for document in _tokenizers()] + [b"\1abc", b"\3defghi", b"\5abcdefabc", b"\7abc"]
    if name in ("manifest", "safetensors"):
        place = _checkpoint()
        if name == "manifest":
            return [(place / MANIFEST).read_bytes(), b"\1abcdef", b"\1tuvwxyztuv"]
        whole = next(place.glob("*.safetensors")).read_bytes()
        size = struct.unpack("<Q", whole[:8])[0]
        return [b"\1" + struct.pack("<H", size) + whole[8:]]
    if name == "recipe":
        return [(RECIPES / f"{name}.yaml").read_bytes() for name in ("tiny", "small", "nvfp4_gap")] + [
            b"train: {steps: 20, tokens: null, micro_batch_size: auto}\nrun: {name: 'x-${train.steps}'}\n",
            b"precision: {rules: [{format: bf16, start: 0.5, modules: ['layers.*']}]}\n",
        ]
    return [struct.pack("<H", 30) + b'{"step": 1, "loss/lm": "NaN"}\n' + b"runs=[a,b]\nto=x"]
