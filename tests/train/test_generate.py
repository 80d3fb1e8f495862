"""A checkpoint speaks: token by token as in one pass, as transformers, and each text as if it were alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.tokenizer import ByteTokenizer
from model.batch import Microbatch
from model.cache import Cache, KeysValues, MambaState
from model.layer import Layer
from parallel import groups
from tests.train.recipes import recipe
from train import loop
from train.checkpoint.reader import open_checkpoint
from train.generate import main
from train.generation.sampling import Sampling
from train.generation.scores import score
from train.generation.speaker import Speaker, open_speaker
from train.generation.speaks import following, head
from train.generation.text import Text
from train.generation.texts import generate, read
from train.huggingface.export import export

PROMPTS = ([73, 116, 32, 105, 115], [65], list(b"Mr. Darcy said that she was not at all sorry to see him go away again."))


@torch.inference_mode()
def next_logits(speaker: Speaker, tokens: torch.Tensor, cache: Cache, texts: list[int]) -> torch.Tensor:
    """fp32 [batch, vocabulary] behind these tokens, int64 [batch, sequence], which the cache now holds. texts: the number of each sequence."""
    microbatch = following(speaker, tokens, cache, texts)
    hidden = speaker.model.hidden(microbatch)
    cache.advance(tokens.shape[1])
    return head(speaker, hidden[-1:], microbatch)[0]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some steps, so that texts are not all the same."""
    path = tmp_path_factory.mktemp("speaks") / "run"
    made = recipe(
        "train.steps=100",
        "train.log_every=50",
        "model.pattern=ME*MEM*/*E/*E",
        f"run.dir={path}",
        "precision=fp32",
        "optimizer.warmup=10",
        "optimizer.decay=20",
    )
    assert loop.run(made) == 0
    groups.shutdown()
    return path


@pytest.fixture
def speaker(run_dir: Path) -> Iterator[Speaker]:
    yield open_speaker(open_checkpoint(run_dir), "fp32")
    groups.shutdown()


def logits(speaker: Speaker, tokens: list[int]) -> torch.Tensor:
    """[sequence, ids of the model], of one pass, as evaluation computes them."""
    ids = torch.tensor([tokens])
    zeros = torch.zeros_like(ids)
    batch = Microbatch.of(
        tokens=ids, labels=ids, loss_mask=zeros.bool(), documents=zeros.int(), reset=False, sample=torch.tensor([0]), step=0, depths=2
    )
    with torch.inference_mode():
        return speaker.model.logits(batch)[0][0]


def whole(speaker: Speaker, tokens: list[int]) -> torch.Tensor:
    """[sequence, vocabulary]: those that texts are made of."""
    return logits(speaker, tokens)[:, : speaker.vocabulary]


@pytest.mark.parametrize("singly", [False, True])
@pytest.mark.parametrize("part", [1, 2, 7, 1000])
def test_tokens_in_parts_equal_one_pass(part: int, singly: bool, speaker: Speaker) -> None:
    tokens = list(PROMPTS[2])
    expected = whole(speaker, tokens)
    cache = Cache.empty(1, torch.device("cpu"))
    cache.revocable = cache.singly = singly
    for start in range(0, len(tokens), part):
        some = tokens[start : start + part]
        found = next_logits(speaker, torch.tensor([some]), cache, [0])
        torch.testing.assert_close(found[0], expected[start + len(some) - 1], rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [len(tokens)]


@pytest.mark.parametrize("part", [1, 5, 512])
def test_scores_are_those_of_one_pass(part: int, speaker: Speaker) -> None:
    for text, (chances, likeliest) in zip(PROMPTS, score(speaker, [[256, *prompt] for prompt in PROMPTS], part), strict=True):
        expected = logits(speaker, [256, *text])[:-1].log_softmax(-1)
        wanted = torch.tensor(text)
        torch.testing.assert_close(chances, expected.gather(1, wanted.unsqueeze(1)).squeeze(1), rtol=1e-5, atol=1e-5)
        assert torch.equal(likeliest, expected.argmax(-1) == wanted)


def test_greedy_texts_are_those_of_transformers(run_dir: Path, speaker: Speaker, tmp_path: Path) -> None:
    export(open_checkpoint(run_dir), tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ours = [token for (token,) in generate(speaker, [prompt], 60, Sampling(temperature=0))]
        given = torch.tensor([prompt])
        made = theirs.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=60,
            min_new_tokens=60,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ours == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(0.9, 0.95, seed=3)])
def test_a_text_does_not_know_of_the_others(sampling: Sampling, speaker: Speaker) -> None:
    together = list(generate(speaker, PROMPTS, 40, sampling))
    for number, prompt in enumerate(PROMPTS):
        hidden, cache = read(speaker, prompt, number)
        logits, alone = head(speaker, hidden, following(speaker, torch.tensor([[0]]), cache, [number]))[0], []
        cache.revocable = cache.singly = True
        for count in range(40):
            chosen = sampling.choose(logits, [number], [len(prompt) + count])
            alone.append(chosen.item())
            logits = next_logits(speaker, chosen.unsqueeze(1), cache, [number])
        assert [chosen[number] for chosen in together] == alone
    assert len({tuple(chosen[number] for chosen in together) for number in range(len(PROMPTS))}) > 1


def test_texts_end(speaker: Speaker) -> None:
    first = [token for (token,) in generate(speaker, PROMPTS[:1], 30, Sampling(0.9, seed=5))]
    end = first[9]
    once = first.index(end)
    made = list(generate(speaker, PROMPTS[:2], 30, Sampling(0.9, seed=5), end=end))
    assert [chosen[0] for chosen in made][: once + 1] == first[: once + 1]
    assert all(chosen[0] is None for chosen in made[once + 1 :])
    assert [token for (token,) in generate(speaker, PROMPTS[:1], 30, Sampling(0.9, seed=5), end=end)] == first[: once + 1]


def held(speaker: Speaker, letter: str, kind: type[MambaState] | type[KeysValues], length: int) -> int:
    """Numbers that layers of one kind keep of a text of this length."""
    _, cache = read(speaker, [65] * length, 0)
    mixers = [layer.mixer for layer in speaker.model.layers.values() if isinstance(layer, Layer) and layer.kind.letter == letter]
    parts: list[MambaState | KeysValues] = [cache.of(mixer, lambda: kind(*torch.zeros(2, 0))) for mixer in mixers]
    assert parts and all(isinstance(part, kind) for part in parts)
    return sum(value.numel() for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor))


def test_mamba_keeps_as_much_however_long_the_text(speaker: Speaker) -> None:
    assert held(speaker, "M", MambaState, 10) == held(speaker, "M", MambaState, 300) > 0
    assert held(speaker, "*", KeysValues, 512) == 8 * held(speaker, "*", KeysValues, 64) > 0


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_the_chances() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
    count = 20_000
    drawn = Sampling(0.7, 1.0, seed=11).choose(logits.expand(count, -1), range(count), [0] * count).bincount(minlength=5)
    expected = (logits[0].double() / 0.7).softmax(0) * count
    assert chi_squared(drawn, expected) < 18.5  # one of a thousand seeds is above it, with 4 degrees of freedom
    # of 0.635, 0.234, 0.086, ...: as few as have 0.8 together are two
    some = Sampling(1.0, 0.8, seed=11).choose(logits.expand(count, -1), range(count), [0] * count).bincount(minlength=5)
    two = logits[0, :2].double().softmax(0) * count
    assert some[2:].sum() == 0
    assert chi_squared(some[:2], two) < 10.8  # with one
    again = Sampling(0.7, 1.0, seed=11).choose(logits.expand(9, -1), range(5, 14), [0] * 9)
    assert again.tolist() == Sampling(0.7, 1.0, seed=11).choose(logits.expand(14, -1), range(14), [0] * 14)[5:].tolist()


def test_a_stop_and_a_character_may_be_spread_over_tokens() -> None:
    text = Text(ByteTokenizer(), "", ("END",))
    said = [text.add(byte) for byte in "é: AN EEND x".encode()]
    assert "".join(said) == text.more == "é: AN E" and text.ended == "stop"
    assert said[0] == "" and said[1] == "é"
    other = Text(ByteTokenizer(), "", ("END",))
    assert "".join([*(other.add(byte) for byte in b"an EN"), other.finish()]) == other.more == "an EN"
    assert other.ended == "length"


@pytest.mark.parametrize(("trained", "asked"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_another_precision_than_the_run(trained: str, asked: str, tmp_path: Path) -> None:
    made = recipe(
        "train.steps=2",
        "optimizer.warmup=1",
        "optimizer.decay=1",
        f"run.dir={tmp_path / 'run'}",
        "precision=bf16",
        f"precision.compute={trained}",
        "train.global_batch_size=2",
    )
    assert loop.run(made) == 0
    groups.shutdown()
    weights, logits = {}, {}
    for precision in (trained, asked):
        speaker = open_speaker(open_checkpoint(tmp_path / "run"), precision)
        weights[precision] = dict(speaker.model.state_dict())
        logits[precision] = next_logits(speaker, torch.tensor([PROMPTS[0]]), Cache.empty(1, torch.device("cpu")), [0])
        groups.shutdown()
    assert {weight.dtype for name, weight in weights[asked].items() if name.endswith("_proj.weight")} == {
        {"fp32": torch.float32, "bf16": torch.bfloat16}[asked]
    }
    for name, weight in weights[trained].items():
        assert torch.equal(weights[asked][name], weight.to(weights[asked][name].dtype)), name
    torch.testing.assert_close(logits["bf16"], logits["fp32"], rtol=0, atol=0.02)
    assert not torch.equal(logits["bf16"], logits["fp32"]) and logits["fp32"].std() > 0.05


def test_weights_rounded_as_training_multiplied_them(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"checkpoint={run_dir}", "prompt=a", "weights=rounded"]) == 2
    assert "weights=rounded changes nothing" in capsys.readouterr().err  # the run was in fp32
    made = recipe("train.steps=2", f"run.dir={tmp_path / 'run'}", "optimizer.warmup=1", "optimizer.decay=1")
    assert loop.run(made) == 0
    groups.shutdown()
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for kind in ("stored", "rounded"):
        speaker = open_speaker(open_checkpoint(tmp_path / "run"), "fp32", kind)
        weights[kind] = {name: parameter.detach().clone() for name, parameter in speaker.model.named_parameters()}
        groups.shutdown()
    changed = {name for name, weight in weights["stored"].items() if not torch.equal(weight, weights["rounded"][name])}
    forms = {name: made.policy.formats(name.removesuffix(".weight"))[0] for name in weights["stored"] if "_proj" in name}
    assert changed == {name for name, form in forms.items() if form.quantises}
    in_nvfp4 = {name for name in changed if str(forms[name]) == "nvfp4"}
    assert {"layers.1.mixer.experts.up_proj", "layers.0.mixer.in_proj.weight"} < in_nvfp4 < changed  # the others are in MXFP8
    for name in in_nvfp4:
        stored, rounded = weights["stored"][name], weights["rounded"][name]
        tiles = quantised_by_tiles(stored if stored.dim() == 3 else stored.unsqueeze(0))
        torch.testing.assert_close(rounded.view_as(tiles), tiles, rtol=1e-6, atol=0)


def quantised_by_tiles(weight: torch.Tensor) -> torch.Tensor:
    """NVFP4 with a scale for 16 x 16 elements, in a few lines of fp64 by the definition: [groups, N, K]."""
    codes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    w = weight.double()
    amax = w.abs().amax((1, 2), keepdim=True)
    tiles = w.unflatten(1, (-1, 16)).unflatten(3, (-1, 16))  # [groups, N / 16, 16, K / 16, 16]
    second = (amax / (6 * 448))[..., None, None]
    scale = (tiles.abs().amax((2, 4), keepdim=True) / 6 / second).float().to(torch.float8_e4m3fn).double() * second
    ratio = (tiles / scale).clamp(-6, 6)
    # nearest code, ties to the even one
    distance = (ratio.abs().unsqueeze(-1) - codes).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    even = torch.tensor([True, False] * 4)
    pick = torch.where(nearest.sum(-1) > 1, (nearest & even).double().argmax(-1), nearest.double().argmax(-1))
    return (codes[pick] * ratio.sign() * scale).flatten(3, 4).flatten(1, 2).float()


def test_the_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [f"checkpoint={run_dir}", "tokens=20", "seed=4", "temperature=0.8"]
    assert main([*line, "prompt='It is, a truth'"]) == 0
    printed, told = capsys.readouterr()
    assert printed.startswith("It is, a truth") and len(printed) > 20 and "[20 tokens, ended by length; " in told
    (tmp_path / "prompts.txt").write_text("It is, a truth\nShe\n")
    assert main([*line, f"prompts={tmp_path / 'prompts.txt'}", f"to={tmp_path / 'to' / 'texts.jsonl'}"]) == 0
    assert "--- 2 of 2 (length)\nShe" in capsys.readouterr().out
    first, second = map(json.loads, (tmp_path / "to" / "texts.jsonl").read_text().splitlines())
    assert first["prompt"] + first["text"] == printed.rstrip("\n") and second["tokens"] == 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prompt=a", "temperature=-1"], "temperature=-1"),
        (["prompt=a", "temperature=nan"], "temperature=nan"),
        (["prompt=a", "temperature=hot"], "temperature=hot is not a number"),
        (["prompt=a", "top_p=0"], "top_p=0"),
        (["prompt=a", "tokens=0"], "tokens=0 must be at least 1"),
        (["prompt=a", "tokens=1.5"], "tokens=1.5 is not a whole number"),
        (["prompt=a", "seed=-1"], "seed=-1"),
        (["prompt=a", "precision=fp4"], "precision=fp4 is none of fp32, bf16"),
        (["prompt=a", "stop=''"], "stop='' is empty"),
        (["prompt=a", "speculative.depth=-1"], "speculative.depth=-1 must be 0"),
        (["prompts=nowhere.txt"], "prompts=nowhere.txt does not exist"),
        (["prompt=a", "prompts=x"], "give either prompt="),
        ([], "give either prompt="),
        (["prompt=a", "speed=9"], "'speed=9' is unknown here"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"checkpoint={run_dir}", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_command_with_drafts(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [f"checkpoint={run_dir}", "prompt=It is", "tokens=40", "seed=4", "temperature=0.5"]
    assert main(line) == 0
    plain, _ = capsys.readouterr()
    assert main([*line, "speculative.depth=3"]) == 0
    drafted, told = capsys.readouterr()
    assert drafted == plain
    # Heads that have been trained, if little, are right more often than one of 256 guesses.
    found = re.search(r"\[(.+) tokens a pass with 3 drafts; .+ accepted: (\d+)% of depth 1", told)
    assert found is not None
    length, share = map(float, found.groups())
    assert length > 1.1 and share > 10


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(0.8, 0.95, seed=1), Sampling(1.0, seed=2)])
def test_ten_thousand_tokens_are_the_same_with_drafts(sampling: Sampling, speaker: Speaker) -> None:
    prompts = [*PROMPTS, list(b"She"), list(b"CHAPTER I."), list(b"Oh! what a"), list(b"My dear"), list(b"The whole of the party were")]

    def texts(depth: int) -> list[list[int]]:
        turns = list(generate(speaker, prompts, 1300, sampling, depth=depth))
        return [[token for turn in turns if (token := turn[text]) is not None] for text in range(len(prompts))]

    plain = texts(0)
    assert sum(map(len, plain)) > 10_000
    for depth in (1, 2, 5):
        assert texts(depth) == plain
