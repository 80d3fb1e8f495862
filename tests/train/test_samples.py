"""monitor.samples: the model speaks while it is trained, in console, file, W&B and report, and training does not notice."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.numbers import numbers
from tests.train.recipes import recipe
from train import loop
from train.generate import main as generate
from train.observe.samples import read_samples
from train.observe.wandb_records import RecordReader, files_of, row_of
from train.recipe.load import load_recipe
from train.report.report import write_report

GIVEN = ("train.steps=4", "optimizer.warmup=1", "optimizer.decay=1", "train.eval_every=2", "checkpoint.every=2", "checkpoint.keep=null")
SPEAKING = ("monitor.samples={every: 2, tokens: 9, temperature: 0, prompts: ['It is a truth', 'No']}",)


@pytest.mark.slow
def test_a_run_that_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loop.run(recipe(*GIVEN, f"run.dir={tmp_path / 'silent'}")) == 0
    capsys.readouterr()
    run_dir = tmp_path / "run"
    assert loop.run(recipe(*GIVEN, *SPEAKING, "monitor.wandb=offline", f"run.dir={run_dir}")) == 0
    assert numbers(run_dir) == numbers(tmp_path / "silent")
    rows = read_samples(run_dir)
    assert [(row["step"], row["prompt"]) for row in rows] == [(2, "It is a truth"), (2, "No"), (4, "It is a truth"), (4, "No")]
    assert capsys.readouterr().out.count("[It is a truth]") == 2
    page = write_report([run_dir], tmp_path / "report").read_text()
    assert "<h2>Samples</h2>" in page
    (log,) = files_of(run_dir, (run_dir / "wandb_id").read_text().strip())
    sent = [row for record in RecordReader(log).new() if (row := row_of(record)) is not None]
    tables = [row.get("samples", row) for row in sent if any(key.startswith("samples") for key in row)]
    assert len(tables) == 2
    table = next((run_dir / "wandb").glob("offline-run-*/files/media/table/samples_4_*.json"))
    assert json.loads(table.read_text())["data"] == [[4, row["prompt"], row["text"], row["ended"]] for row in rows[2:]]


def test_the_live_model_says_what_its_checkpoint_says(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert loop.run(recipe(*GIVEN, *SPEAKING, "precision=fp32", f"run.dir={run_dir}")) == 0
    for step in (2, 4):
        to = tmp_path / "texts.jsonl"
        (tmp_path / "prompts.txt").write_text("It is a truth\nNo\n")
        checkpoint = run_dir / f"checkpoints/step-{step:08d}"
        assert generate([f"checkpoint={checkpoint}", f"prompts={tmp_path / 'prompts.txt'}", "tokens=9", "temperature=0", f"to={to}"]) == 0
        made = [json.loads(line)["text"] for line in to.read_text().splitlines()]
        assert made == [row["text"] for row in read_samples(run_dir) if row["step"] == step]


def spoken(rank: int, run_dir: str) -> int:
    given = recipe(*GIVEN, *SPEAKING, "precision=fp32", "parallel.expert=2", f"run.dir={run_dir}", world_size=int(os.environ["WORLD_SIZE"]))
    return loop.run(given)


@pytest.mark.slow
def test_experts_spread_over_ranks(tmp_path: Path, ranks: Callable[[int], Callable[..., Any]]) -> None:
    assert loop.run(recipe(*GIVEN, *SPEAKING, "precision=fp32", f"run.dir={tmp_path / 'one'}")) == 0
    assert ranks(2)(spoken, str(tmp_path / "two")) == [0, 0]
    assert read_samples(tmp_path / "two") == read_samples(tmp_path / "one")


@pytest.mark.slow
def test_texts_of_steps_that_are_taken_again_are_void(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert loop.run(recipe(*GIVEN, *SPEAKING, f"run.dir={run_dir}")) == 0
    first = read_samples(run_dir)
    for part in ("finished.json", "checkpoints/step-00000004/manifest.json"):
        (run_dir / part).unlink()
    assert loop.run(recipe(*GIVEN, *SPEAKING, f"run.dir={run_dir}")) == 0
    assert read_samples(run_dir) == first


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("monitor.samples.every=-1",), ["monitor.samples.every=-1", "0 for never"]),
        (("monitor.samples.prompts=[]",), ["monitor.samples.prompts=[]"]),
        (("monitor.samples.every=5", "parallel.tensor=2"), ["monitor.samples.every=5", "parallel.tensor=2", "train.generate"]),
    ],
)
def test_what_cannot_speak_is_refused(overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        load_recipe("tiny", *overrides, world_size=None)
    assert all(word in str(refused.value) for word in words)
