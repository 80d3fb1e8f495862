"""A sentence is said once, on however many ranks it comes up."""

import json
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from parallel.layout import world_size
from train.refusal import refuse


def test_one_process_says_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert refuse("no") == 2
    assert capsys.readouterr().err == "error: no\n"


def test_ranks_of_torchrun_say_each_sentence_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's, which outlives its ranks
    environment = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for rank, message in enumerate(("no", "never", "no")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        assert refuse(message) == 2
    assert capsys.readouterr().err == "error: no\nerror: never\n"
    assert json.loads((tmp_path / "2.json").read_text())["message"] == "error: no"  # torchrun's summary shows it


def test_without_torchrun_other_ranks_say_who_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        refuse("no")
    assert capsys.readouterr().err == "error: no\nerror: rank 1: no\n"


def test_ranks_that_could_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match="WORLD_SIZE=4 is set without MASTER_ADDR and MASTER_PORT and RANK, so every rank would be a run of its own"
    ):
        world_size()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE='many' is no number of ranks"):
        world_size()
