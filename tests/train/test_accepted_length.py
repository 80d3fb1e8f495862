"""accept/<domain>/length: tokens a pass gives, as follows from the text the model writes without drafts and what its heads say to it."""

from pathlib import Path

import pytest
import torch

from data.batch import Batch
from parallel import groups
from tests.train.numbers import numbers_in
from tests.train.recipes import recipe
from train import loop
from train.checkpoint.checkpointer import load_weights
from train.checkpoint.reader import open_checkpoint
from train.evaluation.acceptance import Acceptance
from train.generation.live import Live
from train.generation.sampling import Sampling
from train.generation.texts import generate
from train.observe.metrics import read_metrics
from train.recipe.load import load_recipe
from train.step import to_microbatch

TOKENS = 24
GIVEN = (
    "train.steps=8",
    "train.eval_every=2",
    "train.sequence_length=32",
    "optimizer.warmup=1",
    "optimizer.decay=1",
    "evaluation.evaluators=[acceptance]",
    "evaluation.acceptance={windows: 3, domains: [novels, json]}",
)
WRITING = (f"evaluation.acceptance={{windows: 3, domains: [novels, json], length_every: 4, length_tokens: {TOKENS}}}",)


def expected(run_dir: Path) -> dict[str, float]:
    """Rounds counted on texts made token after token: a pass that follows place p gives one token, and those its heads at p had right."""
    made = loop.build(recipe(*GIVEN, *WRITING, "precision=fp32"))
    try:
        load_weights(open_checkpoint(str(run_dir)), made.chunks)
        model, acceptance, depth = made.chunks[0].eval(), made.recipe.evaluation.known["acceptance"], made.mtp_depths
        assert isinstance(acceptance, Acceptance)
        vocabulary, found = made.data.tokenizer.vocab_size, {}
        for domain in acceptance.domains:
            tokens = passes = 0
            for window in acceptance.text(domain, made).ids:
                prompt = window[:16].tolist()
                told = generate(Live(model, 8, 1.0, vocabulary), [prompt], TOKENS + depth, Sampling(0.0))
                text = torch.tensor([[*prompt, *(row[0] for row in told if row[0] is not None)]])
                nothing = torch.zeros_like(text)
                batch = Batch(text, nothing, nothing.bool(), nothing.int(), False, torch.zeros(1, dtype=torch.int64), 0)
                with torch.no_grad():
                    drafts = [each[0, :, :vocabulary].argmax(-1) for each in model.logits(to_microbatch(batch, made.layout, 1.0, depth))]
                known = len(prompt) + 1
                while known < len(prompt) + TOKENS:
                    place, right = known - 2, 0
                    while right < depth and drafts[right + 1][place] == text[0, known + right]:
                        right += 1
                    tokens, passes, known = tokens + right + 1, passes + 1, known + right + 1
            found[domain] = tokens / passes
        return found
    finally:
        groups.shutdown()


def test_tokens_a_pass(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert loop.run(recipe(*GIVEN, *WRITING, "precision=fp32", f"run.dir={run_dir}")) == 0
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows if "accept/novels/length" in row] == [4, 8]
    lengths = expected(run_dir)
    assert {domain: rows[-1][f"accept/{domain}/length"] for domain in lengths} == pytest.approx(lengths)
    assert min(lengths.values()) > 1 and all(row["accept/json/length_low"] <= row["accept/json/length"] for row in rows[3::4])


@pytest.mark.slow
def test_training_does_not_notice(tmp_path: Path) -> None:
    for name, overrides in (("silent", ()), ("writing", WRITING)):
        assert loop.run(recipe(*GIVEN, *overrides, f"run.dir={tmp_path / name}")) == 0
    rows = [{key: value for key, value in numbers_in(row).items() if "/length" not in key} for row in read_metrics(tmp_path / "writing")]
    assert rows == [numbers_in(row) for row in read_metrics(tmp_path / "silent")]


def test_a_split_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.acceptance\.length_every=4 asks for texts.*parallel\.pipeline=2"):
        load_recipe(
            "tiny", "evaluation.evaluators=[acceptance]", "evaluation.acceptance.length_every=4", "parallel.pipeline=2", world_size=None
        )
