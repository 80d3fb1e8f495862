"""A mixer registered by a test alone is read from a recipe, counted, planned for layouts and trained; wrong ones are refused in one sentence."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from model.batch import Microbatch
from model.config import ModelConfig
from model.context import ModelContext
from model.count import count, linear_modules, other_products
from model.hybrid import HybridModel
from model.linear import Linear
from model.mixer import MIXERS, NOT_GIVEN, Dimension, Mixer, Needed, Products, Sizes, register_mixer
from model.mlp import MLPSizes
from model.parameter import output_std
from model.pattern import parse
from tests.model.build import CONFIG, microbatch, open_context
from tests.train.recipes import recipe
from train.huggingface.config import hugging_face_config
from train.recipe.reading import RecipeError, defaults, plain, read


@dataclass(frozen=True)
class ShiftSizes(Sizes):
    shift_width: Needed = NOT_GIVEN
    """Features that look one token back."""
    shift_share: float = 0.5
    """Of the token before."""

    def validate(self) -> None:
        if not 0 < self.shift_share < 1:
            raise ValueError(f"model.shift_share={self.shift_share} must lie between 0 and 1")


class Shift(nn.Module):
    """Mixes every token with the one before it, in a space of its own width."""

    def __init__(self, context: ModelContext, name: str):
        super().__init__()
        sizes, hidden = context.config.sizes(ShiftSizes), context.config.hidden_size
        self.share = sizes.shift_share
        self.up_proj = Linear(context, f"{name}.up_proj", hidden, sizes.shift_width, "column", std=context.config.init_std)
        self.down_proj = Linear(context, f"{name}.down_proj", sizes.shift_width, hidden, "row", std=output_std(context))

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        wide = self.up_proj(x, microbatch)
        before = nn.functional.pad(wide[:-1], (0, 0, 0, 0, 1, 0))
        return self.down_proj(torch.lerp(wide, before, self.share), microbatch)


SHIFT = Mixer(
    letter="S",
    name="shift",
    build=Shift,
    sizes=ShiftSizes,
    dimensions=(Dimension("shift_width", ("tensor",)),),
    products=lambda sizes, sequence_length: (Products("shift", 3.0 * sizes.shift_width),),
    active_share=lambda sizes, parameter: 0.5 if parameter.startswith("up_proj") else 1.0,
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with patch.dict(MIXERS):
        register_mixer(SHIFT)
        yield


def test_its_keys_are_keys_of_a_recipe() -> None:
    made = recipe("model.pattern='MS*E/S/S'", "model.shift_width=32")
    assert made.model.sizes(ShiftSizes) == ShiftSizes(shift_width=32)
    values = plain(made.model)
    assert values["shift_width"] == 32 and values["shift_share"] == 0.5 and values["mamba_heads"] == 16
    assert read(ModelConfig, values, "model") == made.model == made.model.of(**values)
    assert defaults(ModelConfig)["shift_width"] is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.pattern=SM"], r"model.shift_width is missing: model.pattern='SM' has a 'S' layer, which needs it"),
        (["model.pattern=SM", "model.shift_width=0"], r"model.shift_width=0 must be at least 1"),
        (["model.pattern=SM", "model.shift_width=16", "model.shift_share=1.5"], r"model.shift_share=1.5 must lie between 0 and 1"),
        (["model.pattern=SM", "model.shift_width=wide"], r"model.shift_width='wide' must be a whole number"),
        (["model.pattern=SXM"], r"'X' at position 2: use \* \(attention\), M \(Mamba-2\), - \(MLP\), E \(MoE\), S \(shift\), / "),
    ],
)
def test_wrong_values_are_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        recipe(*overrides)


def test_layouts_are_planned_for_it() -> None:
    given = ("model.pattern=SM", "model.shift_width=33", "parallel.tensor=2")
    with pytest.raises(RecipeError, match=r"model.shift_width=33 is not a multiple of parallel.tensor=2"):
        recipe(*given, world_size=2)
    assert recipe(*given, "model.shift_width=64", world_size=2).parallel.tensor == 2
    with pytest.raises(RecipeError, match=r"parallel.expert=2 needs MoE layers, but model.pattern='SM' has no E"):
        recipe("model.pattern=SM", "model.shift_width=32", "parallel.expert=2", world_size=2)


def test_it_is_counted() -> None:
    without, with_it = CONFIG.changed(pattern="M"), CONFIG.changed(pattern="MS/S/S", shift_width=48)
    own = 2 * 48 * CONFIG.hidden_size
    counted, before = count(with_it), count(without)
    assert counted.parameters - before.parameters == own + CONFIG.hidden_size  # its norm
    assert counted.active - before.active == own * 3 / 4 + CONFIG.hidden_size
    found = {module.name: module for module in linear_modules(with_it, 2)}
    up, down, shared = (
        found[f"{name}"] for name in ("layers.1.mixer.up_proj", "layers.1.mixer.down_proj", "mtp.layers.0.layers.0.mixer.up_proj")
    )
    assert (up.rows, up.columns, down.rows, down.columns) == (24, 32, 32, 24)
    assert shared.flops == 2 * up.flops == 4 * 48 * 32  # two depths share the block
    shift = [(one.module, one.flops) for one in other_products(with_it, 64) if one.what == "shift"]
    assert shift == [("layers.1.mixer", 144.0), ("mtp.layers.0.layers.0.mixer", 288.0)]


def test_it_trains() -> None:
    with open_context(config=CONFIG.changed(pattern="SS", shift_width=48)) as context:
        model = HybridModel(context)
        model(microbatch(12)).sum().backward()
        assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in model.parameters())


def test_hugging_face_has_no_such_layer() -> None:
    config = CONFIG.changed(pattern="MS", shift_width=48)
    with pytest.raises(
        ValueError, match=r"model.pattern='MS' has 'S' \(shift\) layers, .* only models of \* \(attention\), M .* can be exported"
    ):
        hugging_face_config(config, dtype="float32", sequence_length=8, end_of_document=None)


def test_nothing_is_written_before_an_export_is_refused(tmp_path: Path) -> None:
    from train import loop
    from train.checkpoint.reader import open_checkpoint
    from train.huggingface.export import export

    short = ("train.steps=1", "optimizer.warmup=0", "optimizer.decay=0", "model.pattern=SM", "model.shift_width=32")
    assert loop.run(recipe(*short, f"run.dir={tmp_path / 'run'}")) == 0
    with pytest.raises(ValueError, match="does not know"):
        export(open_checkpoint(tmp_path / "run"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@dataclass(frozen=True)
class Taken(Sizes):
    mamba_heads: int = 3


@dataclass(frozen=True)
class WithoutDefault(Sizes):
    shift_back: int


@dataclass(frozen=True)
class General(Sizes):
    hidden_size: int = 3


@pytest.mark.parametrize(
    ("letter", "sizes", "sentence"),
    [
        ("M", MLPSizes, r"cannot have the letter 'M': use one character other than / \| \* M - E S"),
        ("/", MLPSizes, r"cannot have the letter '/'"),
        ("XY", MLPSizes, r"cannot have the letter 'XY'"),
        ("X", Taken, r"cannot have the key mamba_heads, which Mamba-2 has"),
        ("X", WithoutDefault, r"the key shift_back of the mixer 'wrong' has no default"),
    ],
)
def test_what_cannot_be_registered(letter: str, sizes: type[Sizes], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        register_mixer(Mixer(letter=letter, name="wrong", build=Shift, sizes=sizes))
    assert letter not in MIXERS or MIXERS[letter].name != "wrong"


def test_two_mixers_may_share_sizes_but_not_the_keys_of_every_model() -> None:
    register_mixer(Mixer(letter="X", name="other shift", build=Shift, sizes=ShiftSizes))
    assert CONFIG.changed(pattern="SX", shift_width=8).sizes(ShiftSizes).shift_width == 8
    register_mixer(Mixer(letter="Y", name="wrong", build=Shift, sizes=General))
    with pytest.raises(ValueError, match=r"General has the key hidden_size, which every model has"):
        CONFIG.changed(pattern="M")


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(TypeError, match="mamba_head"):
        CONFIG.changed(mamba_head=3)


def test_patterns() -> None:
    assert parse("MS*E-/S/S").mtp == ("S", "S")
    with pytest.raises(ValueError, match="no layer before"):
        parse("/S")
