"""The lm-evaluation-harness on a checkpoint: as on the exported model in transformers, by the harness's own code."""

# ruff: noqa: F811 (fixtures of another file)

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from data.documents import documents_of
from data.questions import held_out, main, questions
from parallel import groups
from tests.train.test_generate import run_dir  # noqa: F401  (fixtures)
from train import evaluate
from train.checkpoint.reader import open_checkpoint
from train.generation.speaker import open_speaker
from train.huggingface.export import export

installed = pytest.mark.skipif(
    find_spec("lm_eval") is None or find_spec("accelerate") is None, reason="needs lm_eval, and accelerate for its own backend"
)


def test_questions_are_of_text_that_training_does_not_see(tmp_path: Path) -> None:
    assert main([f"to={tmp_path}"]) == 0
    made = [json.loads(line) for line in (tmp_path / "austen_next.jsonl").read_text().splitlines()]
    assert len(made) == 300
    assert 0.15 < sum(question["answer"] == 0 for question in made) / len(made) < 0.35
    ends = [
        " ".join(novel[len(novel) - int(len(novel) * 0.05) :].decode(errors="ignore").split())
        for novel in documents_of("corpus:austen", "text")
    ]
    for question in made:
        right = question["choices"][question["answer"]]
        assert len(set(question["choices"])) == 4
        assert any(f"{question['context']} {right}" in end for end in ends)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tasks, and one that asks for text."""
    path = tmp_path_factory.mktemp("tasks")
    assert main([f"to={path}"]) == 0
    task = json.loads((path / "austen_next.yaml").read_text())
    says = {
        "task": "austen_says",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [". ", "e th"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    kept = {key: value for key, value in task.items() if key not in ("doc_to_choice", "target_delimiter")}
    (path / "austen_says.yaml").write_text(json.dumps(kept | says))
    return path


@installed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_are_those_of_the_harness_on_the_exported_model(run_dir: Path, tasks: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from train.harness import HarnessModel

    names = ["austen_next", "austen_text", "austen_says"]
    checkpoint = open_checkpoint(run_dir)
    export(checkpoint, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run_dir / "tokenizer")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=200, batch_size=1, device="cpu", add_bos_token=False)
    try:
        ours = HarnessModel(open_speaker(checkpoint, "fp32"), batch=5, max_length=200)
        found, expected = (
            simple_evaluate(lm, tasks=names, task_manager=TaskManager(include_path=str(tasks)), limit=12, bootstrap_iters=0)
            for lm in (ours, theirs)
        )
    finally:
        groups.shutdown()
    for name in names:
        assert len(found["samples"][name]) == 12
        for mine, other in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert mine["doc"] == other["doc"]
            for a, b in zip(mine["resps"], other["resps"], strict=True):
                if name == "austen_says":
                    assert a == b
                elif name == "austen_text":
                    assert math.isclose(a[0], b[0], rel_tol=1e-5)
                else:
                    assert math.isclose(float(a[0][0]), float(b[0][0]), rel_tol=1e-5, abs_tol=1e-4) and a[0][1] == b[0][1]
    assert len({sample["resps"][0][0] for sample in found["samples"]["austen_says"]}) > 1


@installed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_prints_a_table_and_keeps_the_results(
    run_dir: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = tmp_path / "kept" / "results.json"
    given = [f"checkpoint={run_dir}", f"include={tasks}", "limit=4", "batch=3", f"to={to}"]
    assert evaluate.main([*given, "tasks=[austen_next,austen_text]"]) == 0
    assert "|austen_next|" in capsys.readouterr().out
    results = json.loads(to.read_text())["results"]
    assert 0 <= results["austen_next"]["acc,none"] <= 1
    assert 1 < results["austen_text"]["bits_per_byte,none"] < 8
    assert evaluate.main([*given, "tasks=[austen]"]) == 2
    assert "tasks=austen is neither in" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    yield


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["limit=3"], "limit=3 is for tasks of the lm-evaluation-harness: give tasks=[...] with it"),
        (["tasks=3"], "tasks=3 is no list of names"),
        (["tasks=[a]", "include=nowhere"], "include=nowhere is no directory"),
        (["tasks=[a]", "batch=0"], "batch=0 must be a whole number of at least 1"),
        (["task=[a]"], "task"),
    ],
)
def test_what_cannot_be_is_said(
    given: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "find_spec", lambda name: object())
    assert evaluate.main(["checkpoint=runs/none", *given]) == 2
    assert sentence in capsys.readouterr().err


def test_without_the_package_a_sentence_says_what_to_install(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    assert evaluate.main(["checkpoint=runs/none", "tasks=[piqa]"]) == 2
    assert (
        "tasks=[piqa] needs the package lm_eval, which is not installed: pip install -c constraints.txt -e '.[eval]'"
        in capsys.readouterr().err
    )


def test_questions_do_not_repeat() -> None:
    import random

    text = held_out()[0]
    asked = [question["context"] for question in questions(text, random.Random(0))]
    assert len(asked) == len(set(map(str, asked))) == 50
