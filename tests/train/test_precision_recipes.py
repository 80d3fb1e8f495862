"""recipes/precision: what each ready-made group runs, and formats that change during a run."""

from pathlib import Path

import pytest

from model.count import linear_modules
from model.precision.backends.transformer_engine import TransformerEngine
from model.precision.formats.base import Format
from model.precision.formats.nvfp4 import NVFP4Options
from tests.train.recipes import recipe
from tests.train.test_resume import outcome
from train import loop
from train.observe.metrics import read_metrics
from train.recipe.load import RECIPES
from train.recipe.tree import Recipe

# Of tiny's first Mamba layer: in_proj and out_proj in fprop / dgrad / wgrad.
WHAT_RUNS = {
    "nvfp4": ("nvfp4/nvfp4/nvfp4", "mxfp8/mxfp8/mxfp8"),
    "nvfp4_all": ("nvfp4/nvfp4/nvfp4", "nvfp4/nvfp4/nvfp4"),
    "nvfp4_forward_only": ("nvfp4/bf16/bf16", "mxfp8/bf16/bf16"),
    "nvfp4_backward_only": ("bf16/nvfp4/nvfp4", "bf16/mxfp8/mxfp8"),
    "nvfp4_no_sr": ("nvfp4/nvfp4/nvfp4", "mxfp8/mxfp8/mxfp8"),
    "nvfp4_no_rht": ("nvfp4/nvfp4/nvfp4", "mxfp8/mxfp8/mxfp8"),
    "nvfp4_1d": ("nvfp4/nvfp4/nvfp4", "mxfp8/mxfp8/mxfp8"),
    "nvfp4_4over6": ("nvfp4/nvfp4/nvfp4", "mxfp8/mxfp8/mxfp8"),
    "nvfp4_then_bf16": ("nvfp4/nvfp4/nvfp4", "mxfp8/mxfp8/mxfp8"),
    "mxfp8": ("mxfp8/mxfp8/mxfp8", "mxfp8/mxfp8/mxfp8"),
    "bf16": ("bf16/bf16/bf16", "bf16/bf16/bf16"),
    "fp32": ("fp32/fp32/fp32", "fp32/fp32/fp32"),
}
OPTIONS = {
    "nvfp4_no_sr": {"stochastic_rounding": False},
    "nvfp4_no_rht": {"hadamard": False},
    "nvfp4_1d": {"weight_scaling": "1d"},
    "nvfp4_4over6": {"clipping": "4over6_mae", "e4m3_bound": 256},
}


def names(formats: tuple[Format, ...]) -> str:
    return "/".join(map(str, formats))


def test_every_group_is_listed_here() -> None:
    assert {path.stem for path in (RECIPES / "precision").glob("*.yaml")} == WHAT_RUNS.keys()


@pytest.mark.parametrize("group", WHAT_RUNS)
def test_what_a_group_runs(group: str) -> None:
    policy = recipe(f"precision={group}").policy
    assert (names(policy.formats("layers.0.mixer.in_proj")), names(policy.formats("layers.0.mixer.out_proj"))) == WHAT_RUNS[group]
    assert names(policy.formats("layers.1.mixer.gate", 0.99)) == "fp32/fp32/fp32"
    if group.startswith("nvfp4") and group != "nvfp4_all":
        for module in ("layers.3.mixer.qkv_proj", "layers.6.mixer.experts.up_proj", "mtp.layers.0.eh_proj", "lm_head"):
            assert names(policy.formats(module)) == "bf16/bf16/bf16", module
    standard, ours = NVFP4Options(), policy.config.form("nvfp4").options
    changed = {field: getattr(ours, field) for field in vars(standard) if getattr(ours, field) != getattr(standard, field)}
    assert changed == OPTIONS.get(group, {})


def check_transformer_engine(recipe: Recipe) -> None:
    formats = recipe.policy.ever(module.name for module in linear_modules(recipe.model))
    TransformerEngine.check(formats, compute=recipe.precision.compute, amax_scope=recipe.precision.amax_scope)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("precision.compute=fp32",), ["precision.compute=fp32", "bf16", "precision.backend=triton"]),
        (
            ("precision.compute=bf16", "precision.nvfp4.row_scaled=true", "precision.amax_scope=tensor_parallel"),
            ["precision.amax_scope=tensor_parallel", "precision.nvfp4.row_scaled=true"],
        ),
    ],
)
def test_what_transformer_engine_cannot_do_is_said_before_the_run(options: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        check_transformer_engine(recipe("precision.backend=transformer_engine", *options))
    assert all(word in str(error.value) for word in words)
    check_transformer_engine(recipe("precision.backend=transformer_engine", "precision.compute=fp32", "precision=bf16"))


@pytest.mark.parametrize(
    ("start", "step"),
    [("0.82", 16), ("decay", 12), ("13steps", 13), ("7k tokens", 14)],  # of 20 steps of 512 tokens, the last 8 decay
)
def test_formats_change_exactly_at_their_step(start: str, step: int) -> None:
    # 0.82 * 20 = 16.4: step 16 (from 0) begins when 0.8 of the run is behind us.
    first = step + 1 if start == "0.82" else step
    policy = recipe(f"precision.schedule=[{{format: bf16, gemms: [fprop], start: {start}}}]").policy
    for number in range(20):
        expected = "bf16/nvfp4/nvfp4" if number >= first else "nvfp4/nvfp4/nvfp4"
        assert names(policy.formats("layers.0.mixer.in_proj", number / 20)) == expected, number


@pytest.mark.slow
def test_a_run_changes_formats_and_a_resumed_one_does_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = (
        "precision.schedule=[{format: bf16, gemms: [fprop], start: 9steps, end: 15steps}, {format: bf16, start: decay, end: 14steps}]"
    )
    given = (schedule, "train.log_every=4", "optimizer.decay=8")
    assert loop.run(recipe(*given, f"run.dir={tmp_path / 'whole'}")) == 0
    printed = capsys.readouterr().out
    assert "NVFP4 backend: cpu" in printed
    assert [line.split()[1] for line in printed.splitlines() if "formats change" in line] == ["10/20", "13/20", "15/20", "16/20"]
    metrics = {m["step"]: m for m in read_metrics(tmp_path / "whole")}
    assert list(metrics) == [1, 4, 8, 10, 12, 13, 15, 16, 20]  # changes are logged at their step
    shares = {step: m["precision/share/nvfp4"] for step, m in metrics.items()}
    assert shares[1] == shares[8] == shares[16] == shares[20] > 0.2
    assert shares[10] == shares[12] == shares[15] == pytest.approx(shares[1] * 2 / 3)
    assert shares[13] == 0.0
    for entry in metrics.values():
        assert sum(value for key, value in entry.items() if key.startswith("precision/share/")) == pytest.approx(1.0)

    # Stopped where formats change, and between.
    for stop in (12, 11):
        run_dir = tmp_path / f"stopped-{stop}"
        assert loop.run(recipe(*given, f"run.dir={run_dir}", f"run.stop_after={stop}")) == 0
        assert loop.run(recipe(*given, f"run.dir={run_dir}")) == 0
        (_, ours), (_, theirs) = outcome(run_dir), outcome(tmp_path / "whole")
        assert ours.keys() == theirs.keys() and all(bool((ours[name] == theirs[name]).all()) for name in ours)
        shares_here = {m["step"]: m["precision/share/nvfp4"] for m in read_metrics(run_dir)}
        assert {step: shares_here[step] for step in shares} == shares


def test_what_runs_is_what_the_schedule_says(tmp_path: Path) -> None:
    """A schedule that covers the whole run gives the bits of the group it spells out."""
    same = ("train.steps=6", "optimizer.warmup=2", "optimizer.decay=2")
    everything = "precision.schedule=[{format: bf16}, {format: fp32, modules: ['*.gate']}]"
    late = "precision.schedule=[{format: bf16, start: 3steps}, {format: fp32, modules: ['*.gate'], start: 3steps}]"
    for name, how in (("bf16", ("precision=bf16",)), ("always", (everything,)), ("late", (late,)), ("nvfp4", ())):
        assert loop.run(recipe(*same, *how, f"run.dir={tmp_path / name}")) == 0
    losses = {name: [m["loss/lm"] for m in read_metrics(tmp_path / name)] for name in ("bf16", "always", "late", "nvfp4")}
    assert losses["always"] == losses["bf16"] != losses["nvfp4"]
    assert losses["late"][:3] == losses["nvfp4"][:3] and losses["late"][3] != losses["nvfp4"][3]
