"""What a number format may do: schemes that are not in the product, each a few lines here, against explicit computations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from model.hybrid import weight_changes
from model.precision import nvfp4
from model.precision.backends.cpu import FusedCPU
from model.precision.formats import registry
from model.precision.formats.base import Format, FormatOptions
from model.precision.formats.bf16 import BF16
from model.precision.formats.nvfp4 import NVFP4 as NVFP4Class
from model.precision.formats.nvfp4 import Name
from model.precision.gemm import Gemm
from model.precision.hadamard import Rotation, rotate
from model.precision.linear import grouped_linear, linear
from model.precision.operand import Encoding, Operand
from model.precision.policy import Policy, PrecisionConfig
from model.precision.site import Call, Site, TokenKeys
from parallel import groups
from tests.precision.operands import NVFP4, REFERENCE, site
from tests.train.recipes import recipe
from train.build import build
from train.train_step import train_step


class Turned(NVFP4Class):
    """Both operands of dgrad and wgrad rotated, by signs drawn anew each step; saved activations and weights are those of fprop, in four bits,
    and are quantised again for the backward pass."""

    name = "turned"

    def encoding(self, operand: Name, call: Call) -> Encoding:
        if operand in ("x", "w"):
            return Encoding("rows")
        rotation = Rotation.drawn(call.key("rotation"), call.step)
        return Encoding("rows" if operand == "dy" else "columns", rotation=rotation)

    def keep(self, x: torch.Tensor, multiplied: Operand, call: Call) -> Operand:
        return multiplied

    def dgrad(self, dy: torch.Tensor, weight: torch.Tensor, call: Call) -> tuple[Operand, Operand]:
        again = whole(self.weight("w", weight, call), call).view(weight.shape)
        return self.quantised("dy", dy, call), self.weight("w_t", again, call)

    def wgrad(self, dy: torch.Tensor, kept: Operand, multiplied: Operand | None, call: Call) -> tuple[Operand, Operand]:
        return self.quantised("dy_t", dy, call), self.quantised("x_t", whole(kept, call), call)


def whole(operand: Operand, call: Call) -> torch.Tensor:
    """An operand of one group as numbers again."""
    assert operand.amax is not None
    return operand.values(call.backend, torch.float32) * (operand.amax / operand.largest)


def exact(x: torch.Tensor, rotation: Rotation | None = None) -> torch.Tensor:
    """x in NVFP4 along its last dimension, rotated before, fp32."""
    return nvfp4.quantize((x if rotation is None else rotate(x, rotation)).contiguous()).dequantize()


def keys(rows: int) -> TokenKeys:
    return TokenKeys(torch.arange(rows) // 8, torch.arange(rows) % 8)


def gradients(form: Format, step: int, backend: Any = REFERENCE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*shape, generator=generator) for shape in ((64, 48), (32, 48), (64, 32)))
    inputs, weight = x.requires_grad_(), w.requires_grad_()
    y = linear(inputs, weight, (form,) * 3, site(backend=backend), keys(64), step)
    y.backward(dy)
    assert inputs.grad is not None and weight.grad is not None
    return [y.detach(), inputs.grad, weight.grad]


@pytest.mark.parametrize("backend", [REFERENCE, FusedCPU()], ids=lambda backend: backend.name)
def test_backward_operands_are_rotated_anew_each_step_and_saved_ones_requantised(backend: Any) -> None:
    form = Turned()
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*shape, generator=generator) for shape in ((64, 48), (32, 48), (64, 32)))
    for step in (3, 4):
        call = Call(site(), (form,) * 3, None, keys(64), step)  # type: ignore[arg-type]
        rotation = Rotation.drawn(call.key("rotation"), step)
        dx = exact(dy, rotation) @ exact(exact(w).T, rotation).T
        dw = exact(dy.T, rotation) @ exact(exact(x).T, rotation).T
        for name, ours, theirs in zip("y dx dw".split(), gradients(form, step, backend), (exact(x) @ exact(w).T, dx, dw), strict=True):
            assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max(), name
    same, other = gradients(form, 3, backend), gradients(form, 4, backend)
    assert all(torch.equal(a, b) for a, b in zip(same, gradients(form, 3, backend), strict=True))
    assert torch.equal(same[0], other[0]) and not torch.equal(same[1], other[1]) and not torch.equal(same[2], other[2])


@dataclass(frozen=True)
class WithMean(Operand):
    """x without its mean over tokens, in NVFP4, and beside it that mean as it is, fp32 [1, K]."""

    mean: torch.Tensor | None = None


class Centred(NVFP4Class):
    """The mean of an activation's feature is what four bits spend themselves on: it is carried beside the quantised residual."""

    name = "centred"

    def fprop(self, x: torch.Tensor, weight: torch.Tensor, call: Call) -> tuple[Operand, Operand]:
        mean = x.float().mean(0, keepdim=True)
        left = self.quantised("x", x - mean, call)
        return WithMean(left.kept, left.rows, left.amax, left.largest, mean), self.weight("w", weight, call)

    def multiply(self, gemm: Gemm, left: Operand, right: Operand, into: torch.Tensor, call: Call) -> None:
        super().multiply(gemm, left, right, into, call)
        if isinstance(left, WithMean):
            assert left.mean is not None
            into += left.mean @ whole(right, call).T


def test_a_mean_beside_the_quantised_residual() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 48, generator=generator) + 20 * torch.randn(1, 48, generator=generator)
    w = torch.randn(32, 48, generator=generator)
    mean = x.mean(0, keepdim=True)
    y = linear(x, w, (Centred(),) * 3, site(), keys(64), 0)
    weight = nvfp4.quantize(w, scaling="2d").dequantize()
    expected = (exact(x - mean) + mean) @ weight.T
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()
    plain = linear(x, w, (NVFP4,) * 3, site(), keys(64), 0)
    truth = x @ weight.T
    assert (y - truth).norm() < 0.2 * (plain - truth).norm()


class RandomScales(NVFP4Class):
    """The randomness of the forward activation lies in its block scales: each is one of the powers of two around what the block needs."""

    name = "random_scales"

    def draws(self, gemm: Gemm) -> bool:
        return gemm == "fprop" or super().draws(gemm)

    def fprop(self, x: torch.Tensor, weight: torch.Tensor, call: Call) -> tuple[Operand, Operand]:
        blocks = x.float().unflatten(1, (-1, nvfp4.BLOCK))
        byte = call.stream("x", of="inputs").bytes(x.shape[1]).unflatten(1, (-1, nvfp4.BLOCK))[..., :1]
        needed = blocks.abs().amax(-1, keepdim=True) / nvfp4.MAX_CODE
        scale = torch.exp2(torch.floor(torch.log2(needed) + byte / 256) + 1)
        return Operand((nvfp4.round_e2m1(blocks / scale) * scale).flatten(1), call.rows), self.weight("w", weight, call)


def test_randomness_in_the_block_scales_belongs_to_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    x, w = torch.randn(32, 48, generator=generator), torch.randn(16, 48, generator=generator)
    form, where = RandomScales(), keys(32)

    def product(rows: torch.Tensor, step: int, here: Site = site(first_expert=3)) -> torch.Tensor:  # noqa: B008
        index = TokenKeys(where.sample[rows], where.position[rows])
        return grouped_linear(x[rows], w[None], [len(rows)], (form,) * 3, here, index, step)

    everything, order = torch.arange(32), torch.randperm(32, generator=generator)
    y = product(everything, 0)
    torch.testing.assert_close(product(order, 0), y[order])
    assert not torch.equal(product(everything, 1), y)
    assert form.draws("fprop") and not NVFP4.draws("fprop")
    expected = x @ nvfp4.quantize(w, scaling="2d").dequantize().T
    assert (y - expected).norm() < 0.2 * expected.norm()


@dataclass(frozen=True)
class SnapOptions(FormatOptions):
    """Of the test's format."""

    bits: int = 3
    """Of mantissa that weights keep."""

    def validate(self, key: str) -> None:
        if not 0 < self.bits < 24:
            raise ValueError(f"{key}.bits={self.bits} must lie between 1 and 23")


class Snapped(BF16):
    """Weights move to a coarse grid after every step; otherwise bf16."""

    name = "snapped"
    Options = SnapOptions
    changes_weights = True

    def after_step(self, weight: torch.Tensor, site: Site, step: int) -> None:
        weight.copy_(snapped(weight, self.options.bits))


def snapped(weight: torch.Tensor, bits: int) -> torch.Tensor:
    mantissa, exponent = torch.frexp(weight)
    return torch.ldexp(torch.round(mantissa * 2**bits), exponent - bits)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats known for one test."""
    monkeypatch.setattr(registry, "FORMATS", dict(registry.FORMATS))
    registry.register_format("snapped", Snapped)


@pytest.mark.usefixtures("registered")
def test_weights_change_after_the_step_and_the_optimizer_goes_on_from_there(tmp_path: Path) -> None:
    rules = "precision.rules=[{format: snapped, modules: [layers.0.*, '*.experts.*'], snapped: {bits: 5}}]"
    run = build(recipe("precision=bf16", rules, f"run.dir={tmp_path}"))
    try:
        for step in range(2):
            train_step(run, step)
        for chunk in run.chunks:
            for name, weight in chunk.named_parameters():
                wanted = name in ("layers.0.mixer.in_proj.weight", "layers.0.mixer.out_proj.weight") or ".experts." in name
                if weight.dim() > 1 and "conv" not in name:
                    assert torch.equal(weight, snapped(weight, 5)) == wanted, name
        before = [weight.clone() for chunk in run.chunks for weight in chunk.parameters()]
        run.engine.reload_masters()
        assert all(torch.equal(a, b) for a, b in zip(before, (w for chunk in run.chunks for w in chunk.parameters()), strict=True))
    finally:
        groups.shutdown()


def test_without_such_a_format_nothing_is_asked() -> None:
    policy = Policy(PrecisionConfig(), 4)
    assert not policy.changes_weights
    chunk: Any = type("Chunk", (), {"context": type("Context", (), {"policy": policy}), "modules": None})
    assert weight_changes([chunk], 0, 0.0) == {}


@pytest.mark.usefixtures("registered")
def test_a_registered_format_is_one_of_the_recipe() -> None:
    config = recipe("precision.default=snapped", "precision.snapped.bits=4").precision
    assert config.options["snapped"] == SnapOptions(4) and repr(config.form("snapped")) == "snapped(bits=4)"
    with pytest.raises(ValueError, match=r"precision.snapped.bits=40 must lie between 1 and 23"):
        recipe("precision.snapped.bits=40")
    with pytest.raises(ValueError, match="'snapped' is registered already"):
        registry.register_format("snapped", Turned)
    with pytest.raises(ValueError, match="calls itself 'turned', not 'twisted'"):
        registry.register_format("twisted", Turned)


def test_encodings_without_meaning_are_refused() -> None:
    stream, rotation = NVFP4, Rotation((1,) * 16)
    for how, words in (
        ({"along": "tiles", "rotation": rotation}, "tiles are rounded to nearest"),
        ({"along": "columns", "row_scaled": True}, "goes with blocks along rows"),
        ({"clipping": "4over6_mae", "stream": stream}, "not with stochastic rounding"),
        ({"rotation": Rotation((1,) * 32)}, "over its 16 elements, not 32"),
    ):
        with pytest.raises(ValueError, match=words):
            Encoding(**how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="power of two of signs"):
        Rotation((1, 1, -1))


def test_drawn_rotations_are_orthogonal_and_differ() -> None:
    for size in (16, 64):
        drawn = [Rotation.drawn((1, 2), step, size) for step in range(20)]
        assert len(set(drawn)) == 20 and Rotation.drawn((1, 2), 3, size) == drawn[3]
        torch.testing.assert_close(drawn[0].matrix() @ drawn[0].matrix().T, torch.eye(size))
        share = sum(sum(sign < 0 for sign in rotation.signs) for rotation in drawn) / (20 * size)
        assert 0.35 < share < 0.65
