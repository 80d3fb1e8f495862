"""Rules to formats: a pure function, tested without a model."""

from typing import Any

import pytest
import yaml

from model.precision.formats.nvfp4 import NVFP4Options
from model.precision.policy import Policy, PrecisionConfig, Rule
from train.recipe.load import RECIPES
from train.recipe.reading import plain as plain_values
from train.recipe.reading import read


def group(name: str) -> PrecisionConfig:
    values: dict[str, Any] = yaml.safe_load((RECIPES / "precision" / f"{name}.yaml").read_text())
    return read(PrecisionConfig, values)


def names(policy: Policy, module: str, progress: float = 0.0) -> str:
    return "/".join(str(form) for form in policy.formats(module, progress))


@pytest.mark.parametrize(("layers", "first_high"), [(88, 74), (7, 5)])
def test_the_rules_of_nemotron3_super(layers: int, first_high: int) -> None:
    policy = Policy(group("nvfp4"), layers)
    for layer in range(layers):
        high = layer >= first_high
        prefix = f"layers.{layer}.mixer"
        for kind in ("in_proj", "experts.up_proj", "experts.down_proj", "shared_experts.up_proj", "shared_experts.down_proj"):
            assert names(policy, f"{prefix}.{kind}") == ("bf16/bf16/bf16" if high else "nvfp4/nvfp4/nvfp4")
        for kind in ("fc1_latent_proj", "fc2_latent_proj", "qkv_proj", "o_proj"):
            assert names(policy, f"{prefix}.{kind}") == "bf16/bf16/bf16"
        assert names(policy, f"{prefix}.out_proj") == ("bf16/bf16/bf16" if high else "mxfp8/mxfp8/mxfp8")
        assert names(policy, f"{prefix}.gate") == "fp32/fp32/fp32"
    assert names(policy, "lm_head") == names(policy, "mtp.layers.0.eh_proj") == "bf16/bf16/bf16"
    assert names(policy, "mtp.layers.0.layers.1.mixer.experts.up_proj") == "bf16/bf16/bf16"
    assert names(policy, "mtp.layers.0.layers.1.mixer.gate") == "fp32/fp32/fp32"


def test_the_last_matching_rule_decides_per_gemm_and_time() -> None:
    config = PrecisionConfig(
        default="nvfp4",
        rules=(Rule("mxfp8", modules=("a.*",)), Rule("bf16", modules=("a.b",), gemms=("fprop",))),
        schedule=(Rule("bf16", gemms=("fprop",), start=0.82), Rule("fp32", modules=("a.c",), start=0.25, end=0.5)),
    )
    policy = Policy(config, 4)
    assert names(policy, "x") == "nvfp4/nvfp4/nvfp4"
    assert names(policy, "a.b") == "bf16/mxfp8/mxfp8"
    assert names(policy, "x", 0.8199) == "nvfp4/nvfp4/nvfp4"
    assert names(policy, "x", 0.82) == names(policy, "x", 1.0) == "bf16/nvfp4/nvfp4"
    assert [names(policy, "a.c", t) for t in (0.2, 0.25, 0.4999, 0.5)] == [
        "mxfp8/mxfp8/mxfp8",
        "fp32/fp32/fp32",
        "fp32/fp32/fp32",
        "mxfp8/mxfp8/mxfp8",
    ]
    assert policy.times == [0.0, 0.25, 0.5, 0.82]


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    policy = Policy(PrecisionConfig(rules=(Rule("bf16", modules=("layers.*.atention",)),)), 4)
    with pytest.raises(ValueError, match=r"precision.rules\[0\].modules='layers.\*.atention' matches no module"):
        policy.check(["layers.0.mixer.in_proj"])
    Policy(PrecisionConfig(rules=(Rule("bf16", modules=("mtp.*",), optional=True),)), 4).check(["layers.0.mixer.in_proj"])


def configured(**values: Any) -> PrecisionConfig:
    return read(PrecisionConfig, values, "precision")


def test_a_rule_changes_options_of_its_own_modules_only() -> None:
    config = configured(
        nvfp4={"hadamard": False},
        rules=[
            {"format": "nvfp4", "modules": ["a.*"], "nvfp4": {"clipping": "4over6_mae", "e4m3_bound": 256}},
            {"format": "nvfp4", "modules": ["a.b"], "gemms": ["wgrad"], "nvfp4": {"stochastic_rounding": False}},
        ],
    )
    policy = Policy(config, 4)
    plain, clipped, rounded = (policy.format_for(*where) for where in (("x", "fprop"), ("a.b", "fprop"), ("a.b", "wgrad")))
    assert plain.options == NVFP4Options(hadamard=False)
    assert clipped.options == NVFP4Options(hadamard=False, clipping="4over6_mae", e4m3_bound=256)
    assert rounded.options == NVFP4Options(hadamard=False, stochastic_rounding=False), "only what this rule says"
    assert plain != clipped and len({plain, clipped, policy.format_for("a.c", "dgrad")}) == 2
    assert [policy.label(form) for form in (plain, clipped, rounded)] == [
        "nvfp4",
        "nvfp4(clipping=4over6_mae, e4m3_bound=256)",
        "nvfp4(stochastic_rounding=false)",
    ]
    assert policy.ever(["x", "a.b"]) == [plain, clipped, rounded]
    # What a recipe stores of it gives the same again.
    assert read(PrecisionConfig, plain_values(config), "precision") == config


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"format": "nvfp4", "nvfp4": {"clipping": "5over6"}}, "precision.rules[1].nvfp4.clipping='5over6' is unknown: use saturate or"),
        ({"format": "nvfp4", "nvfp4": {"e4m3_bound": 256}}, "precision.rules[1].nvfp4.e4m3_bound=256 is for 4over6_mae and 4over6_mse"),
        ({"format": "nvfp4", "nvfp4": {"hadamrd": False}}, "precision.rules[1].nvfp4.hadamrd is no key of a recipe"),
        (
            {"format": "bf16", "nvfp4": {"hadamard": False}},
            "precision.rules[1].nvfp4 gives options of nvfp4, but precision.rules[1].format is bf16",
        ),
        ({"format": "fp4"}, "precision.rules[1].format='fp4' is unknown: use one of fp32, bf16, mxfp8, nvfp4"),
    ],
    ids=str,
)
def test_a_wrong_rule_is_named(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        Policy(configured(rules=[{"format": "bf16"}, rule]), 4)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_moments_become_fractions() -> None:
    config = PrecisionConfig(schedule=(Rule("bf16", start="late", end="later"), Rule("fp32", start=0.5)))
    asked = []

    def fraction(key: str, text: str) -> float:
        asked.append(key)
        return {"late": 0.25, "later": 0.75}[text]

    policy = Policy(config.timed(fraction), 4)
    assert asked == ["precision.schedule[0].start", "precision.schedule[0].end"]
    assert policy.times == [0.0, 0.25, 0.5, 0.75] and names(policy, "x", 0.3) == "bf16/bf16/bf16"
    with pytest.raises(ValueError, match="'late' is a moment of a recipe"):
        Policy(config, 4)
