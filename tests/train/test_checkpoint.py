"""What is written is what is read, in any layout; and nothing that happens to a disk makes a wrong checkpoint load."""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel.shards import Piece
from train.checkpoint.boxes import Box
from train.checkpoint.manifest import MANIFEST, CheckpointError
from train.checkpoint.parts import Part, parts_of
from train.checkpoint.plan import owned_boxes
from train.checkpoint.reader import Checkpoint, latest, open_checkpoint
from train.checkpoint.retention import Retention
from train.checkpoint.writer import save

# Sections of a Mamba input projection (z, x, B, C, dt), all in one stored tensor; every one is split over the ranks.
SECTIONS = (8, 8, 4, 4, 4)
HIDDEN = 6
EXPERTS = 4


def in_proj_pieces(rank: int, size: int) -> list[Piece]:
    pieces, start, local = [], 0, 0
    for rows in SECTIONS:
        n = rows // size
        piece = Piece(
            "layers.0.mixer.in_proj.weight",
            (sum(SECTIONS), HIDDEN),
            (start + rank * n, 0),
            (slice(local, local + n), slice(None)),
        )
        pieces.append(piece)
        start, local = start + rows, local + n
    return pieces


def qkv_pieces(rank: int, size: int) -> list[Piece]:
    pieces, local = [], 0
    for name, rows in (("q", 8), ("k", 4), ("v", 4)):
        n = rows // size
        name = f"layers.1.mixer.{name}_proj.weight"
        pieces.append(Piece(name, (rows, HIDDEN), (rank * n, 0), (slice(local, local + n),)))
        local += n
    return pieces


def expert_pieces(rank: int, size: int) -> list[Piece]:
    n = EXPERTS // size
    return [Piece(f"layers.2.mixer.experts.{rank * n + e}.up_proj.weight", (10, HIDDEN), (0, 0), (e,)) for e in range(n)]


def out_proj_pieces(rank: int, size: int) -> list[Piece]:
    """Row-parallel: the input dimension is split."""
    n = 8 // size
    return [Piece("layers.0.mixer.out_proj.weight", (HIDDEN, 8), (0, rank * n), (slice(None), slice(None)))]


def conv_pieces(rank: int, size: int) -> list[Piece]:
    n = 16 // size
    return [Piece("layers.0.mixer.conv1d.weight", (16, 1, 4), (rank * n, 0, 0), ())]


def scalar_pieces(rank: int, size: int) -> list[Piece]:
    return [Piece("temperature", (), (), ())]


MODEL = {
    "in_proj": (in_proj_pieces, lambda n: (28 // n, HIDDEN)),
    "qkv": (qkv_pieces, lambda n: (16 // n, HIDDEN)),
    "experts": (expert_pieces, lambda n: (EXPERTS // n, 10, HIDDEN)),
    "out_proj": (out_proj_pieces, lambda n: (HIDDEN, 8 // n)),
    "conv": (conv_pieces, lambda n: (16 // n, 1, 4)),
    "scalar": (scalar_pieces, lambda n: ()),
}


def global_value(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def local_parameter(pieces: list[Piece], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a rank holds when the global tensors have their `global_value`, built without the code under test."""
    local = torch.full(shape, float("nan"), dtype=dtype)
    for piece in pieces:
        extent = local[piece.local].shape
        index = tuple(slice(o, o + n) for o, n in zip(piece.offset, extent, strict=True))
        local[piece.local] = global_value(piece.name, piece.shape, dtype)[index]
    assert not local.isnan().any()
    return local


def layout_parts(size: int, data_ranks: int | None = None, fill: bool = True) -> list[tuple[torch.Tensor, list[Part]]]:
    """Every rank's parts of every parameter of MODEL: (tensor holding them, parts), ranks one after the other.

    data_ranks: None for whole parameters, else each is flattened and sharded unevenly over that many ranks.
    """
    held = []
    for make_pieces, make_shape in MODEL.values():
        for rank in range(size):
            pieces, shape = make_pieces(rank, size), make_shape(size)
            local = local_parameter(pieces, shape)
            if data_ranks is None:
                tensor = local if fill else torch.zeros_like(local)
                held.append((tensor, list(parts_of("exp_avg", pieces, shape, tensor))))
                continue
            edges = [0, *(local.numel() * d // data_ranks + 1 for d in range(1, data_ranks)), local.numel()]
            for a, b in itertools.pairwise(edges):
                flat = local.flatten()[a:b].clone()
                tensor = flat if fill else torch.zeros_like(flat)
                held.append((tensor, list(parts_of("exp_avg", pieces, shape, tensor, (a, b)))))
    return held


def flattened(held: list[tuple[torch.Tensor, list[Part]]]) -> list[Part]:
    return [part for _, parts in held for part in parts]


LAYOUTS = {"one": (1, None), "two": (2, None), "four": (4, None), "one flat": (1, 3), "two flat": (2, 3)}


@pytest.mark.parametrize("source", LAYOUTS, ids=lambda s: f"from {s}")
def test_any_layout_loads_any_other(tmp_path, source):
    save(tmp_path, 1, flattened(layout_parts(*LAYOUTS[source])), {}, shard_bytes=400)
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    assert len(checkpoint.manifest.files) > 3
    for target in LAYOUTS.values():
        wanted = layout_parts(*target, fill=False)
        checkpoint.load_into(flattened(wanted))
        for (got, _), (expected, _) in zip(wanted, layout_parts(*target), strict=True):
            assert torch.equal(got, expected)
    for name in checkpoint.names("exp_avg"):
        full = checkpoint.read_full(f"exp_avg/{name}")
        assert torch.equal(full, global_value(name, tuple(full.shape)))


def test_stored_names_do_not_depend_on_the_layout(tmp_path):
    names = []
    for step, layout in enumerate(LAYOUTS.values()):
        names.append(Checkpoint(save(tmp_path, step, flattened(layout_parts(*layout)), {})).names("exp_avg"))
    assert names[0] == sorted(
        [
            "layers.0.mixer.in_proj.weight",
            "layers.0.mixer.out_proj.weight",
            "layers.0.mixer.conv1d.weight",
            "temperature",
        ]
        + [f"layers.1.mixer.{p}_proj.weight" for p in "qkv"]
        + [f"layers.2.mixer.experts.{e}.up_proj.weight" for e in range(EXPERTS)]
    )
    assert all(n == names[0] for n in names)


def whole(name: str, tensor: torch.Tensor) -> Part:
    shape = tuple(tensor.shape)
    return Part(name, shape, Box((0,) * len(shape), shape), tensor)


def simple(step: int = 1) -> list[Part]:
    torch.manual_seed(step)
    return [whole("model/a", torch.randn(50, 20)), whole("model/b", torch.randn(300))]


SPECIAL = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1.17549435e-38, 3.0])


@pytest.mark.parametrize(
    "tensor",
    [
        SPECIAL,
        SPECIAL.bfloat16(),
        torch.arange(5) - 2,
        torch.tensor([True, False]),
        torch.tensor(7),
        torch.arange(12.0).view(3, 4).t(),
    ],
    ids=["fp32", "bf16", "int64", "bool", "scalar", "transposed"],
)
def test_values_come_back_bit_for_bit_in_their_dtype(tmp_path, tensor):
    checkpoint = Checkpoint(save(tmp_path, 1, [whole("model/x", tensor), whole("model/odd", torch.ones(3, dtype=torch.int8))], {}))
    back = checkpoint.read_full("model/x")
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))


def test_files_are_plain_safetensors_within_the_size_limit(tmp_path):
    path = save(tmp_path, 1, simple(), {}, shard_bytes=1000)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == 7  # four times 960 bytes (12 rows of 80) and 160; then 1000 and 200
    parts = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert torch.equal(parts["model/a[0:12, 0:20]"], simple()[0].tensor[:12])
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 1000
    assert {p.name for p in path.iterdir()} == {MANIFEST, *(f.name for f in files)}


def test_state_tokens_and_step_are_stored(tmp_path):
    state = {"loop": {"loss": 0.1 + 0.2, "seen": [1, 2]}, "wandb": "abc", "nothing": None, "big": 2**60}
    save(tmp_path, 12, simple(), state, tokens=34)
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.tokens, checkpoint.state) == (12, 34, state)
    assert checkpoint.path.name == "step-00000012"


@pytest.mark.parametrize(
    "state, words",
    [({1: 2}, "key 1"), ({"a": {"b": torch.ones(1)}}, "state.a.b is a Tensor"), ({"a": [{1}]}, "a[0] is a set")],
)
def test_state_json_would_change_is_refused(tmp_path, state, words):
    with pytest.raises(CheckpointError, match=words.replace("[", r"\[").replace("]", r"\]")):
        save(tmp_path, 1, simple(), state)
    assert latest(tmp_path) is None


# --- refusing what does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, words",
    [
        (whole("model/missing", torch.ones(2)), "has no tensor model/missing"),
        (whole("model/a", torch.ones(20, 50)), "is torch.float32 [50, 20] in checkpoint"),
        (whole("model/a", torch.ones(50, 20).bfloat16()), "but torch.bfloat16 [50, 20] in this run"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path, part, words):
    checkpoint = Checkpoint(save(tmp_path, 1, simple(), {}))
    good = whole("model/b", torch.zeros(300))
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_into([good, part])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not good.tensor.any()


@pytest.mark.parametrize(
    "parts, words",
    [
        ([Part("model/a", (4, 4), Box((0, 0), (3, 4)), torch.ones(3, 4))], "lacks 4 of its 16 elements"),
        ([Part("model/a", (4,), Box((2,), (4,)), torch.ones(4))], "does not lie in its shape"),
        ([Part("model/a", (4,), Box((0,), (4,)), torch.ones(3))], "part of shape (3,) in a box of shape (4,)"),
        ([whole("model/a", torch.ones(2)), whole("model/a", torch.ones(4))], "disagree about tensor model/a"),
        ([whole("model/a", torch.ones(2, dtype=torch.complex64))], "which the format does not store"),
    ],
    ids=["gap", "outside", "mismatch", "disagreement", "dtype"],
)
def test_a_checkpoint_with_holes_is_never_written(tmp_path, parts, words):
    save(tmp_path, 1, simple(), {})
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, 2, parts, {}, retention=Retention(1))
    assert words in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_pieces_that_do_not_fit_their_parameter_are_refused():
    with pytest.raises(CheckpointError, match="selects 1 dimensions"):
        list(parts_of("model", [Piece("a", (4, 4), (0, 0), (0,))], (4, 4), torch.ones(4, 4)))
    with pytest.raises(CheckpointError, match="step 2"):
        list(parts_of("model", [Piece("a", (2,), (0,), (slice(0, 4, 2),))], (4,), torch.ones(4)))


# --- who writes what --------------------------------------------------------------------------------------------------


def describe(*boxes: Box) -> list[tuple[str, torch.dtype, tuple[int, ...], Box]]:
    return [("x", torch.float32, (12,), box) for box in boxes]


def test_replicas_are_written_by_the_lowest_rank():
    halves = describe(Box((0,), (6,))), describe(Box((6,), (6,)))
    owned = owned_boxes([halves[0], halves[1], halves[1], halves[0]])
    assert owned == [[(0, Box((0,), (6,)))], [(0, Box((6,), (6,)))], [], []]


def test_overlapping_shards_are_cut_so_that_each_element_is_written_once():
    """The same tensor sharded as 5 + 7 by one pair of ranks and as 4 + 8 by another."""
    plan = [describe(Box((0,), (5,))), describe(Box((5,), (7,))), describe(Box((0,), (4,))), describe(Box((4,), (8,)))]
    assert owned_boxes(plan) == [[(0, Box((0,), (5,)))], [(0, Box((5,), (7,)))], [], []]
    partial = [describe(Box((0,), (5,))), describe(Box((3,), (9,)))]
    assert owned_boxes(partial) == [[(0, Box((0,), (5,)))], [(0, Box((5,), (7,)))]]


def test_a_tensor_shared_by_two_modules_is_written_once(tmp_path):
    tensor = torch.randn(8, 3)
    checkpoint = Checkpoint(save(tmp_path, 1, [whole("model/x", tensor), whole("model/x", tensor)], {}))
    assert len(checkpoint.stored("model/x").parts) == 1


# --- latest, damage, retention ----------------------------------------------------------------------------------------


def steps(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def damage_manifest_value(path: Path) -> None:
    document = json.loads((path / MANIFEST).read_text())
    document["tokens"] += 1
    (path / MANIFEST).write_text(json.dumps(document))


DAMAGE = {
    "flipped byte": (lambda p: flip(next(p.glob("*-000.safetensors")), -5), "does not match its checksum"),
    "flipped header": (lambda p: flip(next(p.glob("*-000.safetensors")), 20), "does not match its checksum"),
    "truncated": (lambda p: os.truncate(next(p.glob("*-001.safetensors")), 100), "has 100 bytes instead of"),
    "file removed": (lambda p: next(p.glob("*-001.safetensors")).unlink(), "rank-00000-001.safetensors is missing"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "never finished"),
    "half a manifest": (lambda p: os.truncate(p / MANIFEST, 300), "cannot be read"),
    "empty manifest": (lambda p: os.truncate(p / MANIFEST, 0), "cannot be read"),
    "altered manifest": (damage_manifest_value, "does not match its own checksum"),
    "emptied": (lambda p: [f.unlink() for f in p.iterdir()], "never finished"),
    "other format": (lambda p: (p / MANIFEST).write_text("[]"), "is not that of"),
    "newer version": (
        lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace('"version": 1', '"version": 2')),
        "format version is 2",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path, kind):
    damage, words = DAMAGE[kind]
    for step in (9, 10, 11):
        save(tmp_path, step, simple(step), {}, shard_bytes=1000)
    damage(tmp_path / "step-00000011")
    said: list[str] = []
    checkpoint = latest(tmp_path, report=said.append)
    assert checkpoint is not None and checkpoint.step == 10
    assert torch.equal(checkpoint.read_full("model/a"), simple(10)[0].tensor)
    assert len(said) == 1 and words in said[0] and "step-00000011" in said[0] and "\n" not in said[0]
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        open_checkpoint(tmp_path / "step-00000011")
    # Training resumes from 10 and reaches 11 again: the damaged directory gives way.
    save(tmp_path, 11, simple(11), {}, retention=Retention(2))
    assert steps(tmp_path) == ["step-00000010", "step-00000011"]
    again = latest(tmp_path, report=pytest.fail)
    assert again is not None and torch.equal(again.read_full("model/a"), simple(11)[0].tensor)


def test_no_flipped_bit_and_no_truncation_goes_unnoticed(tmp_path):
    save(tmp_path, 1, simple(), {})
    path = save(tmp_path, 2, simple(), {"loss": 1.25}, shard_bytes=2000)
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        intact = file.read_bytes()
        for _ in range(12):
            position = rng.randrange(len(intact))
            damaged = bytearray(intact)
            damaged[position] ^= 1
            for content in (damaged, intact[:position]):
                file.write_bytes(content)
                checkpoint = latest(tmp_path, report=lambda _: None)
                assert checkpoint is not None and checkpoint.step == 1, (file.name, position)
        file.write_bytes(intact)
    checkpoint = latest(tmp_path, report=pytest.fail)
    assert checkpoint is not None and checkpoint.step == 2


def test_without_verification_only_sizes_are_compared(tmp_path):
    path = save(tmp_path, 1, simple(), {})
    flip(next(path.glob("*.safetensors")), -1)
    assert latest(tmp_path, verify=False) is not None
    assert latest(tmp_path, report=lambda _: None) is None


def test_nothing_to_resume_from(tmp_path):
    assert latest(tmp_path / "absent") is None
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no valid checkpoint in"):
        open_checkpoint(tmp_path)


def test_a_path_may_name_a_run_its_checkpoints_or_a_step(tmp_path):
    for step in (1, 2):
        save(tmp_path / "checkpoints", step, simple(step), {})
    paths = [tmp_path, tmp_path / "checkpoints", str(tmp_path / "checkpoints" / "step-00000001")]
    assert [open_checkpoint(path).step for path in paths] == [2, 2, 1]


def test_steps_sort_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step, simple(), {})
    newest = latest(tmp_path)
    assert newest is not None and newest.step == 100_000_000


@pytest.mark.parametrize("keep", [None, 0])
def test_retention_off_keeps_all(tmp_path, keep):
    for step in (1, 2, 3):
        save(tmp_path, step, simple(), {}, retention=Retention(keep))
    assert len(steps(tmp_path)) == 3


def test_retention_counts_complete_checkpoints_only_and_never_the_future(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, simple(step), {})
    (tmp_path / "step-00000003" / MANIFEST).unlink()
    (tmp_path / "notes").mkdir()
    # 3 is not complete, so 4 and 2 are the two newest; 1 goes.
    save(tmp_path, 4, simple(4), {}, retention=Retention(2))
    assert steps(tmp_path) == ["notes", "step-00000002", "step-00000003", "step-00000004"]
    # A run taken back to step 2 must not delete itself in favour of the future it abandoned.
    save(tmp_path, 3, simple(3), {}, retention=Retention(1))
    assert steps(tmp_path) == ["notes", "step-00000003", "step-00000004"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, simple(1), {"first": True})
    save(tmp_path, 1, simple(2), {"first": False})
    assert steps(tmp_path) == ["step-00000001"]
    checkpoint = latest(tmp_path)
    assert checkpoint is not None and checkpoint.state == {"first": False}
    assert torch.equal(checkpoint.read_full("model/a"), simple(2)[0].tensor)


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    path = save(tmp_path, 1, simple(1), {})
    path.rename(tmp_path / "step-00000001.old")
    checkpoint = latest(tmp_path, report=pytest.fail)
    assert checkpoint is not None and checkpoint.step == 1
    save(tmp_path, 1, simple(2), {})
    assert steps(tmp_path) == ["step-00000001"]


def test_the_next_save_clears_away_what_a_killed_one_left(tmp_path):
    (tmp_path / "step-00000007.partial").mkdir(parents=True)
    (tmp_path / "step-00000007.partial" / "rank-00000-000.safetensors").write_bytes(b"half")
    said: list[str] = []
    assert latest(tmp_path, report=said.append) is None
    assert said == []  # it is no checkpoint
    save(tmp_path, 8, simple(), {})
    assert steps(tmp_path) == ["step-00000008"]


# --- disks that fail, processes that die ------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_leaves_older_checkpoints(tmp_path):
    save(tmp_path, 1, simple(), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # the kernel refuses to grow a file beyond this
        with pytest.raises(CheckpointError) as error:
            save(tmp_path, 2, simple(), {}, retention=Retention(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot write checkpoint" in str(error.value) and "File too large" in str(error.value)
    assert "\n" not in str(error.value)
    assert steps(tmp_path) == ["step-00000001"]
    assert latest(tmp_path, report=pytest.fail) is not None


def test_an_unusable_directory_is_one_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("a file, not a directory")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*step-00000001: File exists"):
        save(tmp_path / "checkpoints", 1, simple(), {})


SAVE_FOREVER = """
import sys, torch
from tests.train.test_checkpoint import whole
from train.checkpoint.retention import Retention
from train.checkpoint.writer import save
step = int(sys.argv[2])
while True:
    values = torch.full((1000, 1000), float(step))
    parts = [whole("model/x", values), whole("model/y", values)]
    save(sys.argv[1], step, parts, {"step": step}, retention=Retention(2), shard_bytes=1 << 20)
    print(step, flush=True)
    step += 1
"""


def test_killed_while_saving_the_previous_checkpoint_is_whole(tmp_path):
    """Processes that do nothing but save are killed at some moment; whatever they left, latest() is consistent."""
    root = Path(__file__).parents[2]
    done = 0
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for delay in (0.0, 0.019, 0.041):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(done + 1)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        finished = [process.stdout.readline(), process.stdout.readline()]
        time.sleep(delay)
        process.kill()
        finished += process.stdout.read().split()
        process.wait()
        confirmed = max(int(line) for line in finished if line.strip())
        checkpoint = latest(tmp_path, report=lambda _: None)
        assert checkpoint is not None
        done = checkpoint.step
        assert confirmed <= done <= confirmed + 1
        assert checkpoint.state == {"step": done}
        for name in ("model/x", "model/y"):
            assert (checkpoint.read_full(name) == done).all()
