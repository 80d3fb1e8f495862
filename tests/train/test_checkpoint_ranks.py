"""Several ranks save and find one checkpoint together."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.train.test_checkpoint import MODEL, flattened, flip, layout_parts, local_parameter, steps, whole
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.parts import Part, parts_of
from train.checkpoint.reader import Checkpoint, latest
from train.checkpoint.writer import save


def rank_parts(rank: int, size: int) -> list[Part]:
    """Every parameter of MODEL split over the ranks, and a tensor all of them hold."""
    parts = [whole("model/replicated", torch.arange(6.0))]
    for make_pieces, make_shape in MODEL.values():
        pieces, shape = make_pieces(rank, size), make_shape(size)
        parts += parts_of("exp_avg", pieces, shape, local_parameter(pieces, shape))
    return parts


def save_together(rank: int, size: int, directory: str) -> str:
    return save(directory, 5, rank_parts(rank, size), {"from": rank}, tokens=7).name


def load_together(rank: int, size: int, directory: str) -> list[bool]:
    checkpoint = latest(directory)
    assert checkpoint is not None
    wanted = [(part, part.tensor.clone()) for part in rank_parts(rank, size)]
    for part, _ in wanted:
        part.tensor.zero_()
    checkpoint.load_into(part for part, _ in wanted)
    return [torch.equal(part.tensor, expected) for part, expected in wanted]


def fail_on_one(rank: int, size: int, directory: str) -> str:
    bad = torch.ones(2, dtype=torch.complex64 if rank == 1 else torch.float32)
    try:
        save(directory, 6, [whole(f"model/{rank}", bad)], {})
    except CheckpointError as error:
        return str(error)
    return "saved"


def find(rank: int, size: int, directory: str) -> tuple[int, list[str]]:
    said: list[str] = []
    checkpoint = latest(directory, report=said.append)
    assert checkpoint is not None
    return checkpoint.step, said


def test_two_ranks_write_one_checkpoint_any_number_reads(ranks, tmp_path):
    directory = tmp_path / "checkpoints"
    assert ranks(2)(save_together, 2, str(directory)) == ["step-00000005"] * 2
    checkpoint = Checkpoint(directory / "step-00000005")
    assert checkpoint.state == {"from": 0} and checkpoint.tokens == 7
    assert sorted(checkpoint.manifest.files) == ["rank-00000-000.safetensors", "rank-00001-000.safetensors"]
    assert [p.file for p in checkpoint.stored("model/replicated").parts] == ["rank-00000-000.safetensors"]
    assert [len(checkpoint.stored("exp_avg/layers.1.mixer.k_proj.weight").parts)] == [2]
    for size in (1, 4):
        wanted = layout_parts(size, fill=False)
        checkpoint.load_into(flattened(wanted))
        for (got, _), (expected, _) in zip(wanted, layout_parts(size), strict=True):
            assert torch.equal(got, expected)
    assert all(all(result) for result in ranks(2)(load_together, 2, str(directory)))


def test_what_one_rank_cannot_write_no_rank_writes(ranks, tmp_path):
    messages = ranks(2)(fail_on_one, 2, str(tmp_path))
    assert messages[0] == messages[1]
    assert "tensor model/1 has dtype torch.complex64" in messages[0] and "(rank 1)" in messages[0]
    assert steps(tmp_path) == []


@pytest.mark.parametrize("file", ["rank-00000-000.safetensors", "rank-00001-000.safetensors"])
def test_all_ranks_agree_to_skip_what_one_of_them_finds_damaged(ranks, tmp_path, file):
    ranks(2)(save_together, 2, str(tmp_path))
    newest = Path(shutil.copytree(tmp_path / "step-00000005", tmp_path / "step-00000009"))
    flip(newest / file, -1)
    (first, said), (second, silent) = ranks(2)(find, 2, str(tmp_path))
    assert first == second == 5 and silent == []
    assert len(said) == 1 and f"{file} does not match its checksum" in said[0]
