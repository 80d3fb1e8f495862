"""What others may have written gives one sentence: no code is run, nothing outside its directory is read or written, and memory stays small.

Found by tests/fuzz, by reading, or by trying; each test names what used to happen.
"""

import ast
import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import zstandard
from tokenizers import models

from data import indexed
from data.documents import DataError, documents_of
from data.tokenizer import FileTokenizer
from tests.runbook import told
from tests.train.recipes import SMALL
from train.checkpoint.boxes import Box
from train.checkpoint.manifest import MANIFEST, CheckpointError
from train.checkpoint.parts import Part
from train.checkpoint.reader import Checkpoint
from train.checkpoint.writer import save
from train.observe.metrics import decode_lines
from train.recipe.cli import main
from train.recipe.guard import read_yaml
from train.recipe.reading import RecipeError

ROOM = Path(__file__).resolve().parents[2]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command line is refused; fails if a recipe was accepted."""
    accepted: list[object] = []

    def accept(recipe: object) -> int:
        accepted.append(recipe)
        return 0

    status = main(accept, "train", arguments)
    captured = capsys.readouterr()
    assert status == 2 and not accepted, captured
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def written(place: Path, name: str, text: str) -> list[str]:
    (place / f"{name}.yaml").write_text(text)
    return ["-cd", str(place), "-cn", name]


# -- recipes ----------------------------------------------------------------------------------------------------------------------------

CALL = "{_target_: pathlib.Path.touch, self: %s}"


@pytest.mark.parametrize(
    "hydra",
    [
        "callbacks: {x: %s}",
        "launcher: {_target_: pathlib.Path}",
        "sweeper: {_target_: pathlib.Path}",
        "job_logging: {handlers: {x: {(): os.mkdir, path: %s}}, root: {handlers: [x]}}",
        "hydra_logging: {formatters: {x: {(): os.mkdir, path: %s}}}",
        "job: {env_set: {LD_PRELOAD: '%s'}}",
    ],
)
def test_a_recipe_runs_no_code(hydra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra imported and called what `hydra.callbacks` of a recipe named."""
    made = tmp_path / "made"
    inner = hydra.replace("%s", str(made) if "path" in hydra or "env_set" in hydra else CALL % made)
    given = written(tmp_path, "evil", f"defaults: [tiny, _self_]\nhydra:\n  {inner}\n")
    assert "no recipe may" in refused(given, capsys)
    assert not made.exists() and "LD_PRELOAD" not in os.environ


def test_a_group_placed_into_hydras_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grp").mkdir()
    (tmp_path / "grp" / "a.yaml").write_text(f"x: {CALL % (tmp_path / 'made')}\n")
    assert "no recipe may" in refused(written(tmp_path, "evil", "defaults: [tiny, grp@hydra.callbacks: a, _self_]\n"), capsys)
    assert not (tmp_path / "made").exists()


def test_targets_are_keys_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = written(tmp_path, "evil", "defaults: [tiny, _self_]\nmodel: {_target_: os.getcwd}\n")
    assert "model._target_ is no key" in refused(given, capsys)


def test_the_environment_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`${oc.env:...}` put a secret into recipe.yaml."""
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2")
    given = written(tmp_path, "evil", "defaults: [tiny, _self_]\nrun: {name: '${oc.env:SECRET_OF_MINE}'}\n")
    said = refused(given, capsys)
    assert "run.name" in said and "hunter2" not in said
    told("A recipe, a checkpoint or data", said.replace("SECRET_OF_MINE", "HOME"), "reads the environment")


def test_an_interpolation_within_bounds_still_works(tmp_path: Path) -> None:
    seen: list[Any] = []

    def note(recipe: Any) -> int:
        seen.append(recipe)
        return 0

    given = written(tmp_path, "good", "defaults: [tiny, _self_]\nrun: {name: 'b${train.global_batch_size}'}\n")
    assert main(note, "train", given) == 0
    assert seen[0].run.name == f"b{seen[0].train.global_batch_size}"


def test_interpolations_that_double_at_every_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "\n".join(f"  k{i}: '${{train.k{i + 1}}}${{train.k{i + 1}}}'" for i in range(40))
    given = written(tmp_path, "evil", f"defaults: [tiny, _self_]\ntrain:\n{lines}\n  k40: xxxxxxxx\n")
    assert "interpolation" in refused(given, capsys)


def test_aliases_that_multiply_at_every_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]
    told("A recipe, a checkpoint or data", refused(written(tmp_path, "evil", "\n".join(lines)), capsys), "stands for more than")
    with pytest.raises(RecipeError, match="alias to what it stands in"):
        read_yaml("a: &a [*a]", "it")
    with pytest.raises(RecipeError, match="deeper"):
        read_yaml("[" * 5000, "it")
    with pytest.raises(RecipeError, match="is not YAML"):
        read_yaml("a: !!python/object/apply:os.getcwd []", "it")


@pytest.mark.parametrize("option", ["--config-path=/tmp", "--experimental-rerun=x.pickle"])
def test_options_that_lead_elsewhere(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not taken here" in refused(["-cn", "tiny", option], capsys)


def test_a_name_cannot_leave_the_directory_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("../x", "..", "a/b"):
        assert "run.name" in refused(["-cn", "tiny", f"run.name={name}"], capsys)


# -- checkpoints ------------------------------------------------------------------------------------------------------------------------


def checkpoint(tmp_path: Path) -> Path:
    parts = [
        Part("model/a", (4, 3), Box((0, 0), (4, 3)), torch.arange(12.0).view(4, 3)),
        Part("step", (), Box((), ()), torch.tensor(7)),
    ]
    return save(tmp_path, 1, parts, {}, tokens=5)


def rewrite(place: Path, change: Any) -> None:
    """The manifest after `change(document)`, with the checksum it should have."""
    document = json.loads((place / MANIFEST).read_bytes())
    change(document)
    document.pop("sha256", None)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (place / MANIFEST).write_text(json.dumps(document))


def absurd(document: dict[str, Any]) -> None:
    tensor = document["tensors"]["model/a"]
    tensor["shape"] = tensor["parts"][0]["shape"] = [1 << 30, 1 << 12]


def elsewhere(document: dict[str, Any]) -> None:
    (name,) = document["files"]
    document["files"]["../secret.safetensors"] = document["files"].pop(name)
    for tensor in document["tensors"].values():
        tensor["parts"][0]["file"] = "../secret.safetensors"


def dimensions(document: dict[str, Any]) -> None:
    document["tensors"]["model/a"]["parts"][0]["shape"].pop()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (absurd, "too small"),  # asked for 17 TB
        (elsewhere, "may not lead out"),  # was read
        (dimensions, "does not lie in its shape"),  # ended in a traceback, as the others do
        (lambda d: d.update(state=[1]), "state is no object"),
        (lambda d: d.update(step="1"), "is no count"),
        (lambda d: d["tensors"]["step"].pop("parts"), "parts"),
        (lambda d: d["tensors"]["step"].update(shape=[1] * 300), "dimensions"),
        (lambda d: d["tensors"]["step"].update(dtype="PICKLE"), "PICKLE"),
        (lambda d: d.update(files=[]), "not made as one of ours"),
    ],
)
def test_manifests(change: Any, said: str, tmp_path: Path) -> None:
    place = checkpoint(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "secret.safetensors").write_bytes(next(place.glob("*.safetensors")).read_bytes())
    rewrite(place, change)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(place)


def test_a_manifest_that_nests_without_end(tmp_path: Path) -> None:
    place = checkpoint(tmp_path)
    (place / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(place)


def test_a_tensor_of_another_kind_than_the_manifest_says(tmp_path: Path) -> None:
    """Was converted in silence."""
    place = checkpoint(tmp_path)
    (file,) = place.glob("*.safetensors")
    content = file.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"').replace(b'"dtype": "F32"', b'"dtype": "I32"')
    assert content != file.read_bytes()
    file.write_bytes(content)
    rewrite(place, lambda d: d["files"].update({file.name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}))
    with pytest.raises(CheckpointError, match="another tensor"):
        Checkpoint(place).read_full("model/a")


# -- data -------------------------------------------------------------------------------------------------------------------------------


def test_compressed_text_that_grows_without_end(tmp_path: Path) -> None:
    """Five kilobytes stood for gigabytes of memory."""
    bomb = zstandard.ZstdCompressor().compress(b"a" * (1 << 28))
    (tmp_path / "x.txt.zst").write_bytes(bomb)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b"a" * (1 << 27), 9))
    for name in ("x.txt.zst", "y.jsonl.gz"):
        with pytest.raises(DataError, match="times its size") as caught:
            list(documents_of(str(tmp_path / name)))
        told("A recipe, a checkpoint or data", f"error: {caught.value}", "times its size")


def test_json_that_nests_without_end(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(DataError, match="is no JSON"):
        list(documents_of(str(tmp_path / "x.jsonl")))
    with pytest.raises(ValueError, match="line 1"):
        decode_lines(b"[" * 100_000 + b"\n")


def test_document_bounds_whose_differences_overflow(tmp_path: Path) -> None:
    """Ended in an IndexError."""
    bounds = (0, (1 << 63) - 1, -2, 2)
    head = indexed.HEADER.pack(indexed.MAGIC, 1, 8, 2, len(bounds))
    (tmp_path / "x.idx").write_bytes(head + struct.pack("<2i2q", 3, 1, 0, 6) + struct.pack("<4q", *bounds))
    np.arange(4, dtype=np.uint16).tofile(tmp_path / "x.bin")
    with pytest.raises(DataError, match="document bounds"):
        indexed.read(tmp_path / "x")


def test_tokenizers_that_cannot_encode(tmp_path: Path) -> None:
    """The library's exceptions, and the panics of its own code, went through everything."""
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizers.Tokenizer(models.WordLevel(vocab={"<|endoftext|>": 0}, unk_token="gone")).to_str())
    with pytest.raises(DataError, match="cannot encode text"):
        FileTokenizer(path, "<|endoftext|>").encode("a word")


def test_tokenizers_with_ids_that_no_model_holds(tmp_path: Path) -> None:
    """Ended in an OverflowError."""
    path = tmp_path / "tokenizer.json"
    path.write_text(
        tokenizers.Tokenizer(models.WordLevel(vocab={"a": 77, "<|endoftext|>": 0}, unk_token="a")).to_str().replace("77", str(1 << 31))
    )
    with pytest.raises(DataError, match="no embedding holds"):
        FileTokenizer(path, "<|endoftext|>")


# -- the whole --------------------------------------------------------------------------------------------------------------------------


def test_nothing_in_the_product_executes_what_it_reads() -> None:
    """No pickle, no eval, no unsafe YAML: a file that is loaded is data."""
    found = []
    for room in ("train", "model", "parallel", "data", "launch"):
        for path in (ROOM / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                imported = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                unsafe = name in {"eval", "exec", "torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen"}
                allows = any(k.arg in ("allow_pickle", "shell") for k in node.keywords) if isinstance(node, ast.Call) else False
                if unsafe or allows or {"pickle", "dill", "cloudpickle", "joblib"} & set(imported):
                    found.append(f"{path.relative_to(ROOM)}:{node.lineno} {name or imported}")  # type: ignore[attr-defined]
    assert not found


@pytest.mark.slow
def test_a_hostile_recipe_through_the_command_itself(tmp_path: Path) -> None:
    made = tmp_path / "made"
    given = written(tmp_path, "evil", f"defaults: [tiny, _self_]\nhydra: {{callbacks: {{x: {CALL % made}}}}}\n")
    done = subprocess.run(
        [sys.executable, "-m", "train", *given, *SMALL, f"run.dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and "no recipe may" in done.stderr
    assert not made.exists() and not (tmp_path / "run").exists()
