"""Numbers that go wrong: each fault is put into a real run, and the run afterwards is the one it should be."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.runbook import told
from tests.train import incidents_runs as runs
from train.checkpoint.reader import Checkpoint, open_checkpoint
from train.observe.metrics import read_metrics
from train.recipe.reading import RecipeError
from train.run_directory import read_history

KEYS = ("loss/lm", "loss/mtp_1", "loss/mtp_2", "loss/total", "grad_norm", "learning_rate", "moe/max_violation", "moe/aux_loss")
SHORT = ("train.steps=12", "checkpoint.every=3")


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(m["step"], *(m[key] for key in KEYS)) for m in read_metrics(run_dir)]


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read_full(name) for name in checkpoint.manifest.tensors}


def same_end(a: Path, b: Path) -> bool:
    ours, theirs = tensors(open_checkpoint(a)), tensors(open_checkpoint(b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def reports(run_dir: Path) -> list[dict[str, Any]]:
    return [
        json.loads(path.read_text())
        for path in sorted((run_dir / "incidents").glob("*.json"), key=lambda path: (len(path.name), path.name))
    ]


def alerts(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def spared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle: a run that never sees samples 40 to 55, those of steps 6 and 7."""
    run_dir = tmp_path_factory.mktemp("oracle") / "run"
    assert runs.run(run_dir, *SHORT, fault=runs.skipping([(40, 56)])) == 0
    return run_dir


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = runs.nan_in_an_experts_gradient([43])
    assert runs.run(tmp_path / "run", "train.steps=6", "run.stop_after=5", "checkpoint.every=5", fault=fault) == 0
    before = tensors(open_checkpoint(tmp_path / "run"))
    assert runs.run(tmp_path / "run", "train.steps=6", "run.stop_after=null", "checkpoint.every=5", fault=fault) == 0
    after = tensors(open_checkpoint(tmp_path / "run"))
    assert open_checkpoint(tmp_path / "run").step == 6
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # weights, optimizer state with its step numbers, expert biases
        assert torch.equal(tensor, after[name]), name
    assert not math.isfinite(read_metrics(tmp_path / "run")[-1]["grad_norm"])
    assert [(a["step"], a["kind"]) for a in alerts(tmp_path / "run")] == [(6, "skipped")]
    told("Steps that are not finite", capsys.readouterr().out, "no weight was changed")


@pytest.mark.parametrize("world", [1, 2])
def test_after_going_back_it_is_the_run_that_never_saw_those_samples(
    world: int, spared: Path, tmp_path: Path, ranks: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    overrides = (*SHORT, "monitor.incidents.skips=2")
    bad = [47, 55]  # of both steps; on two ranks they are the second one's
    if world == 1:
        assert runs.run(run_dir, *overrides, fault=runs.nan_in_an_experts_gradient(bad)) == 0
        told("Steps that are not finite", capsys.readouterr().out, "ALERT (not finite)", "going back to the checkpoint of step")
        assert curve(run_dir) == curve(spared)
        assert same_end(run_dir, spared)
    else:
        assert ranks(world)(runs.on_ranks, run_dir, world, overrides, "nan_in_an_experts_gradient", (bad,)) == [0, 0]
        ours, theirs = curve(run_dir), curve(spared)
        assert [m[0] for m in ours] == [m[0] for m in theirs] == list(range(1, 13))
        assert all(abs(x[1] - y[1]) < 2e-6 for x, y in zip(ours, theirs, strict=True))
    (report,) = reports(run_dir)
    assert report["steps"] == [6, 7] and report["samples"] == [[40, 56]] and report["reproduced"]
    found = report["first_not_finite"]
    assert (found["phase"], found["rank"]) == ("backward", world - 1) and 55 in found["samples"]
    assert found["module"].endswith("experts") and found["what"].endswith("experts.1.up_proj.weight")
    assert found["formats"] == {"fprop": "fp32", "dgrad": "fp32", "wgrad": "fp32"}
    assert [row["sample"] for row in report["samples_of_last_step"]] == list(range(48, 56))
    assert [a["kind"] for a in alerts(run_dir)] == ["skipped", "skipped", "not finite", "rewind"]
    assert read_metrics(run_dir)[-1]["data/skipped_samples"] == 16
    assert open_checkpoint(run_dir).state["incidents"]["skipped_samples"] == [[40, 56]]


def test_samples_passed_over_are_on_record_and_behind_the_run(tmp_path: Path) -> None:
    text, run_dir = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"{i} is less than {i + 1}. " for i in range(1500)))
    given = (*SHORT, "monitor.incidents.skips=2", "data.validation_fraction=0")
    first, second = (f"data.phases=[{{blend:[{{path:'{text}'}}],tokens:{tokens}}}]" for tokens in ("null", 100 * 64))
    fault = runs.exploding_loss([41, 49], math.nan)
    assert runs.run(run_dir, *given, first, "run.stop_after=8", fault=fault) == 0
    assert [(entry["step"], entry["skipped_samples"]) for entry in read_history(run_dir)] == [(3, [[40, 56]])]
    with pytest.raises(RecipeError, match=r"within the 80 samples its 8 steps have read \(16 of them passed over\): append"):
        runs.run(run_dir, *given, f"data.phases=[{{blend:[{{path:'{text}'}}],tokens:{79 * 64}}},{{blend:[{{path:'{text}'}}]}}]")
    other = second.replace("text.txt", "other.txt")
    (tmp_path / "other.txt").write_text(text.read_text() * 2)
    assert runs.run(run_dir, *given, other, "run.allow=[data.phases]", "run.stop_after=9") == 0
    phases = yaml.safe_load((run_dir / "recipe.yaml").read_text())["data"]["phases"]
    assert [phase["tokens"] for phase in phases] == [80 * 64, 100 * 64]
    assert [entry["skipped_samples"] for entry in read_history(run_dir) if "skipped_samples" in entry] == [[[40, 56]]]


def test_a_run_stopped_after_going_back_goes_on_without_the_samples(spared: Path, tmp_path: Path) -> None:
    run_dir, overrides = tmp_path / "run", (*SHORT, "monitor.incidents.skips=2")
    fault = runs.exploding_loss([41, 49], math.nan)
    assert runs.run(run_dir, *overrides, "run.stop_after=8", fault=fault) == 0
    (report,) = reports(run_dir)
    assert (report["first_not_finite"]["phase"], report["decision"][:29]) == ("loss", "the run went back to step 3, ")
    assert runs.run(run_dir, *overrides, "run.stop_after=null") == 0  # without the fault, and without the samples
    assert curve(run_dir) == curve(spared)
    assert same_end(run_dir, spared)


def test_it_goes_back_so_often_and_then_stops_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    fault = runs.exploding_loss(range(40, 10_000), math.nan)
    assert runs.run(run_dir, *SHORT, "monitor.incidents.skips=2", "monitor.incidents.rewinds=1", fault=fault) == 1
    said = capsys.readouterr().err
    told("The run stopped because numbers", said, "monitor.incidents.rewinds=1")
    assert "the last one step 7; first of all" in said and "Traceback" not in said
    assert [report["decision"].split(":")[0][:20] for report in reports(run_dir)] == ["the run went back to", "the run stopped"]
    assert open_checkpoint(run_dir).step == 3


def test_without_a_checkpoint_to_go_back_to_it_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = runs.exploding_loss([0, 8], math.nan)
    assert runs.run(tmp_path / "run", "train.steps=4", "monitor.incidents.skips=2", fault=fault) == 1
    told("The run stopped because numbers", capsys.readouterr().err, "there is no checkpoint of step 0")


@pytest.mark.slow
@pytest.mark.parametrize("reaction", ["alert", "rewind"])
def test_a_spike_is_told_and_can_be_passed_over(reaction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("train.steps=42", "checkpoint.every=10", f"monitor.incidents.on_spike={reaction}")
    sample = 36 * 8 + 5  # of step 37
    assert runs.run(tmp_path / "run", *overrides, fault=runs.exploding_loss([sample], 300.0)) == 0
    spikes = [a for a in alerts(tmp_path / "run") if a["kind"] == "spike"]
    assert spikes and all(a["step"] == 37 for a in spikes)
    told("A spike of the loss", capsys.readouterr().out, "ALERT (spike): loss/lm")
    if reaction == "rewind":
        assert runs.run(tmp_path / "oracle", *overrides, fault=runs.skipping([(36 * 8, 37 * 8)])) == 0
        assert curve(tmp_path / "run") == curve(tmp_path / "oracle")
        assert same_end(tmp_path / "run", tmp_path / "oracle")


@pytest.mark.parametrize("reaction", ["stop", pytest.param("rewind", marks=pytest.mark.slow)])
def test_a_bit_that_flips_in_one_replica_is_found_and_named(reaction: str, tmp_path: Path, ranks: Callable[..., Any]) -> None:
    name, world = "layers.0.mixer.in_proj.weight", 3
    overrides = (
        *("train.steps=8", "train.global_batch_size=6", "train.micro_batch_size=1", "checkpoint.every=4"),
        *("monitor.replicas.every=2", f"monitor.replicas.on_mismatch={reaction}"),
    )
    status = ranks(world)(runs.on_ranks, tmp_path / "run", world, overrides, "flip_a_bit", (1, name, 5))
    assert status == [1 if reaction == "stop" else 0] * world
    (report,) = reports(tmp_path / "run")
    assert report["steps"] == [6, 6]
    assert f"{name.removesuffix('.weight')}" in report["cause"] and "on rank 1 differs from most of ranks 0, 1, 2" in report["cause"]
    if reaction == "stop":
        told("Replicas that differ", (tmp_path / "run/log.txt").read_text().replace("Failed: ", "error: "))
    if reaction == "rewind":
        assert ranks(world)(runs.on_ranks, tmp_path / "sound", world, overrides, "", ()) == [0] * world
        assert curve(tmp_path / "run") == curve(tmp_path / "sound")
        assert same_end(tmp_path / "run", tmp_path / "sound")
