"""Transformer Engine: what we ask of it, compared with its own classes where it is installed, and the layouts of its operands.

FP4 kernels run on Blackwell only. Here a stand-in plays their part: it returns what the definition gives, laid out as TE documents it (codes
of the transpose for columns, scales padded to 128 x 4 with whatever was in memory).
"""

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from model.precision import nvfp4
from model.precision.backends.choice import choose
from model.precision.backends.transformer_engine import TransformerEngine
from model.precision.backends.transformer_engine_layers import arguments, recipe, translate
from model.precision.certify import checks
from model.precision.certify.matrix import quantize as through
from model.precision.certify.report import Report
from model.precision.formats.base import Format
from model.precision.gemm import GEMMS
from model.precision.hadamard import FIXED, UNSIGNED, Rotation, rotate
from model.precision.linear import grouped_linear, linear
from model.precision.operand import Encoding, Packed, Rows
from model.precision.philox import Given, Stream
from model.precision.site import TokenKeys, WeightCache
from tests.precision.operands import BF16, FP32, MXFP8, NVFP4, REFERENCE, site
from tests.precision.operands import nvfp4_with as form

missing = TransformerEngine.missing


# -- recipes -------------------------------------------------------------------------------------------------------------------------------


def test_the_default_recipe_is_transformer_engines_default() -> None:
    assert translate(NVFP4) == {
        "disable_rht": False,
        "disable_stochastic_rounding": False,
        "disable_2d_quantization": False,
        "row_scaled_activation": False,
        "nvfp4_4over6": "none",
        "nvfp4_4over6_e4m3_use_256": "none",  # without effect: nvfp4_4over6 is off
        "nvfp4_4over6_err_mode": "MAE",
        "fp8_dpa": False,
        "fp8_mha": False,
        "backward_override": None,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hadamard": False}, {"disable_rht": True}),
        ({"stochastic_rounding": False}, {"disable_stochastic_rounding": True}),
        ({"weight_scaling": "1d"}, {"disable_2d_quantization": True}),
        ({"row_scaled": True}, {"row_scaled_activation": True}),
        ({"clipping": "4over6_mae"}, {"nvfp4_4over6": "all"}),
        ({"clipping": "4over6_mse", "e4m3_bound": 256}, {"nvfp4_4over6": "all", "nvfp4_4over6_err_mode": "MSE"}),
        ({"clipping": "4over6_mae", "e4m3_bound": 256}, {"nvfp4_4over6": "all", "nvfp4_4over6_e4m3_use_256": "all"}),
    ],
)
def test_every_option_has_its_field(options: dict[str, Any], expected: dict[str, Any]) -> None:
    given, default = translate(form(**options)), translate(NVFP4)
    bound = {"nvfp4_4over6_e4m3_use_256": "all"} if options.get("e4m3_bound") == 256 else {}
    assert {key: value for key, value in given.items() if value != default[key]} == expected | bound


def test_mxfp8_and_unquantised_formats() -> None:
    assert translate(MXFP8) == {
        "margin": 0,
        "enable_2d_quantization": False,
        "fp8_dpa": False,
        "fp8_mha": False,
        "backward_override": None,
    }
    for plain in (BF16, FP32):
        with pytest.raises(ValueError, match="without a recipe"):
            translate(plain)


def test_one_recipe_for_a_module_or_none() -> None:
    assert arguments((NVFP4, NVFP4, NVFP4), "m") == ("NVFP4BlockScaling", translate(NVFP4))
    assert arguments((MXFP8, MXFP8, MXFP8), "m") == ("MXFP8BlockScaling", translate(MXFP8))
    assert arguments((BF16, BF16, BF16), "m") is None
    assert arguments((FP32, BF16, BF16), "m") is None
    assert recipe((BF16, BF16, BF16), "m") is None


def test_a_quantised_forward_pass_alone_can_be_expressed() -> None:
    kind, given = arguments((form(clipping="4over6_mae"), BF16, BF16), "m") or ("", {})
    assert kind == "NVFP4BlockScaling"
    assert given["backward_override"] == "high_precision" and given["nvfp4_4over6"] == "all"
    assert given["disable_rht"], "Transformer Engine refuses the transform beside 4over6, even where no wgrad is quantised"
    assert (arguments((MXFP8, BF16, BF16), "m") or ("", {}))[1]["backward_override"] == "high_precision"


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ((NVFP4, NVFP4, BF16), ["precision.rules", "nvfp4 in fprop, nvfp4 in dgrad and bf16 in wgrad"]),
        ((BF16, NVFP4, NVFP4), ["precision.rules", "bf16 in fprop"]),
        ((NVFP4, MXFP8, NVFP4), ["precision.rules", "mxfp8 in dgrad"]),
        ((NVFP4, FP32, FP32), ["precision.rules", "fp32 in dgrad"]),
        ((form(clipping="4over6_mse"),) * 3, ["precision.nvfp4.clipping=4over6_mse", "wgrad"]),
        ((form(row_scaled=True),) * 3, ["precision.nvfp4.row_scaled=True", "row_scaled=false"]),
    ],
)
def test_what_a_recipe_cannot_express_is_refused(formats: tuple[Format, Format, Format], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        recipe(formats, "layers.3.mixer.in_proj")
    message = str(refusal.value)
    assert message.startswith("layers.3.mixer.in_proj: ") and "\n" not in message
    for word in [*words, "precision.backend=triton"]:
        assert word in message


def recipes_of_transformer_engine() -> Any:
    try:
        import transformer_engine.common.recipe as module
    except Exception as error:
        # TE raises RuntimeError and OSError too, when its parts do not fit.
        pytest.skip(f"transformer_engine.common.recipe does not import: {error!r}")
    return module


@pytest.mark.parametrize(
    ("kind", "wanted"), [("NVFP4BlockScaling", form()), ("NVFP4BlockScaling", form(hadamard=False)), ("MXFP8BlockScaling", MXFP8)]
)
def test_every_field_exists_in_transformer_engine(kind: str, wanted: Format) -> None:
    module = recipes_of_transformer_engine()
    cls = getattr(module, kind)
    fields = {item.name for item in dataclasses.fields(cls)}
    given = translate(wanted)
    assert not given.keys() - fields
    # What is left are the number formats, of which each recipe has one.
    assert fields - given.keys() <= {"fp4_format", "fp8_format"}
    built = recipe((wanted, wanted, wanted), "m")
    assert isinstance(built, cls)
    for name, value in given.items():
        assert getattr(built, name) == value, name


def test_transformer_engine_accepts_every_option() -> None:
    recipes_of_transformer_engine()
    for clipping in ("saturate", "4over6_mae", "4over6_mse"):
        for bound in (448, 256):
            built = recipe((form(clipping=clipping, e4m3_bound=bound), BF16, BF16), "m")
            assert not built.fp4_quant_fwd_inp.random_hadamard_transform
    operands = recipe((NVFP4,) * 3, "m")
    assert operands.fp4_quant_fwd_weight.fp4_2d_quantization and not operands.fp4_quant_fwd_inp.stochastic_rounding
    assert operands.fp4_quant_bwd_grad.stochastic_rounding and operands.fp4_quant_bwd_grad.random_hadamard_transform


# -- availability --------------------------------------------------------------------------------------------------------------------------


def test_missing_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wanted = "the transformer-engine package is not installed: pip install -c constraints.txt -e '.[te]' on a machine with CUDA"
    assert missing(torch.device("cpu")) == wanted
    with pytest.raises(ValueError, match=r"precision\.backend=transformer_engine cannot run: the transformer-engine package"):
        choose("transformer_engine", torch.device("cpu"))


def test_missing_with_the_package(monkeypatch: pytest.MonkeyPatch, stand_in: SimpleNamespace) -> None:
    cuda = torch.device("cuda")
    assert missing(torch.device("cpu")) == "it needs a Blackwell GPU, and this run is on cpu"
    for capability, complaint in (((9, 0), "this one has 9.0"), ((12, 0), "this one has 12.0"), ((10, 0), None), ((10, 3), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        found = missing(cuda)
        assert found is None if complaint is None else complaint in (found or "")
    monkeypatch.setenv("NVTE_USE_FAST_MATH", "1")
    assert "NVTE_USE_FAST_MATH" in (missing(cuda) or "")
    monkeypatch.setenv("NVTE_USE_FAST_MATH", "0")
    del stand_in.extension.nvfp4_quantize_with_amax
    assert "2.20.2" in (missing(cuda) or "")
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", None)
    assert "does not import" in (missing(cuda) or "")


# -- operands ------------------------------------------------------------------------------------------------------------------------------


class Quantizer:
    """What TE's NVFP4Quantizer is told, by TE's names."""

    def __init__(
        self,
        fp4_dtype: Any = "e2m1",
        rowwise: bool = True,
        columnwise: bool = True,
        with_amax_reduction: bool = False,
        amax_reduction_group: Any = None,
        with_rht: bool = False,
        with_post_rht_amax: bool = False,
        with_2d_quantization: bool = False,
        stochastic_rounding: bool = False,
        row_scaled_nvfp4: bool = False,
        nvfp4_use_4over6: bool = False,
        nvfp4_e4m3_max: int = 448,
        nvfp4_4over6_err_mode: str = "MAE",
        with_random_sign_mask: bool = True,
    ) -> None:
        given = locals()
        self.dtype = fp4_dtype
        for name in inspect.signature(Quantizer).parameters:
            setattr(self, name, given[name])
        self.internal = False


def padded_scales(scales: torch.Tensor) -> torch.Tensor:
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    memory = torch.full((rows, columns), 0x5A, dtype=torch.uint8)
    memory[: scales.shape[0], : scales.shape[1]] = scales
    return memory


def kernel(x: torch.Tensor, q: Any, amax: torch.Tensor | None) -> SimpleNamespace:
    """The definition's values in TE's layout."""
    assert q.internal and q.rowwise != q.columnwise
    assert x.is_contiguous() and not x.requires_grad and x.shape[0] % 16 == 0 and x.shape[1] % 16 == 0
    assert q.columnwise or not q.with_rht, "TE rotates along columns only"
    assert not (q.with_2d_quantization and q.columnwise), "TE's kernel does nothing for tiles without rows"
    assert not q.nvfp4_use_4over6 or not (q.with_rht or q.stochastic_rounding)
    assert q.with_post_rht_amax == q.with_rht and q.row_scaled_nvfp4 == (amax is None)
    along = "columnwise" if q.columnwise else "rowwise"
    operand = x.T.contiguous() if q.columnwise else x
    if q.with_rht:
        assert x.dtype == torch.bfloat16
        operand = rotate(operand, FIXED if q.with_random_sign_mask else UNSIGNED)
    result = nvfp4.quantize(
        operand,
        scaling="2d" if q.with_2d_quantization else "1d",
        random_bits=torch.randint(256, operand.shape, dtype=torch.uint8) if q.stochastic_rounding else None,
        clipping=f"4over6_{q.nvfp4_4over6_err_mode.lower()}" if q.nvfp4_use_4over6 else "saturate",  # type: ignore[arg-type]
        e4m3_bound=q.nvfp4_e4m3_max,
        row_scaled=q.row_scaled_nvfp4,
        amax=None if amax is None else amax[0],
    )
    empty = ("rowwise_data", "columnwise_data", "rowwise_scale_inv", "columnwise_scale_inv")
    stored: dict[str, torch.Tensor | None] = dict.fromkeys(empty)
    stored |= {f"{along}_data": result.codes, f"{along}_scale_inv": padded_scales(result.scales), f"amax_{along}": result.amax.reshape(-1)}
    return SimpleNamespace(**{f"_{name}": value for name, value in stored.items()})


def gemm(b: Any, a: Any, *, out_dtype: torch.dtype, layout: str) -> tuple[torch.Tensor]:
    """B A^T in TE's order of operands, from the bytes."""
    assert layout == "TN" and out_dtype == torch.float32

    def value(t: Any) -> torch.Tensor:
        codes = nvfp4.decode(t.rowwise_data)
        assert codes.shape[0] % 16 == 0 and codes.shape[1] % 32 == 0 and t.rowwise_scale_inv.shape[0] % 128 == 0
        scales = t.rowwise_scale_inv[: len(codes), : codes.shape[1] // 16].contiguous().view(torch.float8_e4m3fn).float()
        return (codes * scales.repeat_interleave(16, dim=1)).double() * t.amax_rowwise.double() / (6 * t.nvfp4_e4m3_max)

    return ((value(a) @ value(b).T).float(),)


ENTERED: list[Any] = []  # recipes of the autocasts around us


@contextmanager
def autocast(*, enabled: bool, recipe: Any) -> Iterator[None]:
    assert enabled
    ENTERED.append(recipe)
    yield
    ENTERED.pop()


class WholeLinear(torch.nn.Module):
    """What TE's Linear does by its documentation: the recipe around the call decides, quantised weights are kept when told so."""

    quantised_weights = 0

    def __init__(self, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        assert not bias and device == "meta"
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.fuse_wgrad_accumulation = False
        self._fp8_workspaces: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        assert is_first_microbatch is False, "True overwrites main_grad, None quantises the weight for every microbatch"
        assert x.dtype == self.weight.dtype == torch.bfloat16 and self.weight.device == x.device
        (entered,) = ENTERED
        if "weight" not in self._fp8_workspaces:
            WholeLinear.quantised_weights += 1
            scaling: Literal["1d", "2d"] = "1d" if entered.disable_2d_quantization else "2d"
            self._fp8_workspaces["weight"] = nvfp4.quantize(self.weight.detach(), scaling=scaling).dequantize()
        return WholeGemms.apply(x, self.weight, self._fp8_workspaces["weight"], entered, self.fuse_wgrad_accumulation)


class WholeGemms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, w: torch.Tensor, entered: Any, fused: bool) -> torch.Tensor:
        ctx.x, ctx.weight, ctx.w, ctx.entered, ctx.fused = x, weight, w, entered, fused
        return (nvfp4.quantize(x).dequantize() @ w.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.entered.backward_override == "high_precision":
            dx, dw = dy.float() @ ctx.weight.float(), dy.float().T @ ctx.x.float()
        else:
            turned = {"hadamard": not ctx.entered.disable_rht}
            dx = nvfp4.quantize(dy).dequantize() @ ctx.w
            left, right = (nvfp4.quantize(t.T.contiguous(), **turned).dequantize() for t in (dy, ctx.x))  # type: ignore[arg-type]
            dw = left @ right.T
        if ctx.fused:
            ctx.weight.main_grad += dw
            ctx.weight.grad_added_to_main_grad = True
            return dx.to(dy.dtype), torch.empty_like(ctx.weight), None, None, None
        return dx.to(dy.dtype), dw.to(dy.dtype), None, None, None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Takes the place of the installed package, or of none."""
    names = ["", ".pytorch", ".pytorch.cpp_extensions", ".pytorch.tensor.storage.nvfp4_tensor_storage", ".common.recipe"]
    package, torch_part, extensions, storage, recipes = (ModuleType(f"transformer_engine{name}") for name in names)
    extension = ModuleType("transformer_engine_torch")
    torch_part.NVFP4Quantizer = Quantizer  # type: ignore[attr-defined]
    torch_part.Linear, torch_part.autocast = WholeLinear, autocast  # type: ignore[attr-defined]
    recipes.NVFP4BlockScaling = recipes.MXFP8BlockScaling = SimpleNamespace  # type: ignore[attr-defined]
    extensions.general_gemm = gemm  # type: ignore[attr-defined]
    storage.NVFP4TensorStorage = SimpleNamespace  # type: ignore[attr-defined]
    extension.quantize = lambda x, quantizer: kernel(x, quantizer, None)  # type: ignore[attr-defined]

    def with_amax(x: torch.Tensor, quantizer: Any, rowwise: torch.Tensor, columnwise: torch.Tensor) -> SimpleNamespace:
        assert rowwise.shape == columnwise.shape == (1,) and rowwise.dtype == torch.float32
        return kernel(x, quantizer, rowwise)

    extension.nvfp4_quantize_with_amax = with_amax  # type: ignore[attr-defined]
    for module in (package, torch_part, extensions, storage, recipes, extension):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return SimpleNamespace(extension=extension)


def operand(rows: int, features: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Packed):
        assert isinstance(ours, Packed) and (ours.along, ours.features) == (theirs.along, theirs.features)
        assert torch.equal(ours.scales, theirs.scales) and torch.equal(ours.codes, theirs.codes)
        assert ours.codes.is_contiguous() and ours.scales.is_contiguous()
    else:
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("packed", [False, True], ids=["products", "packed"])
@pytest.mark.parametrize("sizes", [(64,), (48, 16), (5, 0, 43), (0,)], ids=str)
@pytest.mark.parametrize("features", [64, 144, 40])
def test_operands_have_the_layout_of_the_interface(stand_in: SimpleNamespace, features: int, sizes: tuple[int, ...], packed: bool) -> None:
    te, rows, x = TransformerEngine(), Rows(sizes), operand(sum(sizes), features)
    encodings = [Encoding("columns"), Encoding("rows"), Encoding("columns", rotation=FIXED), Encoding("rows", rotation=UNSIGNED)]
    encodings.append(Encoding("rows", row_scaled=True))
    for along in ("rows", "columns", "tiles"):
        if along != "tiles" or (rows == rows.padded(16) and features % 16 == 0):
            encodings += [Encoding(along, clipping="4over6_mae", bound=256.0), Encoding(along, clipping="4over6_mse")]  # type: ignore[arg-type]
    for encoding in encodings:
        amax = te.amax(x, rows, encoding)
        assert_same(amax, REFERENCE.amax(x, rows, encoding))
        if not encoding.row_scaled:
            amax *= 1.25  # as the maximum over a group of ranks may be
        ours = te.quantize(x, amax, rows, encoding, packed=packed)
        if sum(sizes):
            assert_same(ours, REFERENCE.quantize(x, amax, rows, encoding, packed=packed))
        elif isinstance(ours, torch.Tensor):
            assert ours.shape == (0, features)


def test_quantize_is_the_definition(stand_in: SimpleNamespace) -> None:
    te, x = TransformerEngine(), operand(48, 96, dtype=torch.float32)
    ways: list[dict[str, Any]] = [
        {},
        {"scaling": "2d"},
        {"row_scaled": True},
        {"amax": torch.tensor(9.0)},
        {"clipping": "4over6_mae", "e4m3_bound": 256},
        {"clipping": "4over6_mse", "scaling": "2d"},
    ]
    turned: list[dict[str, Any]] = [{"hadamard": True}, {"hadamard": True, "hadamard_signs": False}]
    for values, how in (
        [(x, way) for way in ways] + [(x.bfloat16(), way) for way in turned] + [(x[:41, :72], {}), (x[:41].bfloat16(), turned[0])]
    ):
        ours, theirs = through(te, values.contiguous(), **how), nvfp4.quantize(values.contiguous(), **how)
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scales)
        assert torch.equal(ours.amax, theirs.amax) and ours.bound == theirs.bound


def test_stochastic_rounding_is_asked_for_where_a_stream_is_given(stand_in: SimpleNamespace) -> None:
    te, rows, x = TransformerEngine(), Rows((32,)), operand(32, 64)
    token = torch.arange(32)
    stream = Stream((1, 2), token, token, 0)
    for encoding in (Encoding("rows"), Encoding("columns")):
        amax = te.amax(x, rows, encoding)
        first, second = (te.quantize(x, amax, rows, dataclasses.replace(encoding, stream=stream)) for _ in range(2))
        assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        assert 0.05 < (first != second).float().mean() < 0.6
        assert_same(te.quantize(x, amax, rows, encoding), te.quantize(x, amax, rows, encoding))


def test_what_transformer_engine_cannot_do_is_refused(stand_in: SimpleNamespace) -> None:
    te, rows = TransformerEngine(), Rows((32,))
    x = operand(32, 64, dtype=torch.float32)
    amax, token = torch.full((1,), 9.0), torch.arange(32)
    stream, ones = Stream((1, 2), token, token, 0), torch.full((32, 1), 9.0)
    drawn, given = Rotation.drawn((1, 2), 3), Given(torch.zeros(32, 64, dtype=torch.uint8))
    row_scaled = Encoding("rows", row_scaled=True)
    for attempt, words in (
        (lambda: te.quantize(x, amax, rows, Encoding("columns", rotation=FIXED)), "bf16 operands only, not float32"),
        (lambda: te.quantize(x.bfloat16(), amax, rows, Encoding("columns", rotation=drawn)), "its own signs only"),
        (lambda: te.quantize(x, amax, rows, Encoding("rows", given)), "draws its random bits itself"),
        (lambda: te.quantize(x.bfloat16(), amax, rows, Encoding("rows", None, FIXED, "4over6_mae")), "clipping=4over6_mae"),
        (lambda: te.quantize(x, ones, rows, row_scaled), "amax of every row itself"),
        (lambda: te.quantize(x, ones, rows, dataclasses.replace(row_scaled, stream=stream)), "rounding to nearest only"),
        (lambda: through(te, x, scaling="2d", row_scaled=True), "row_scaled"),
        (lambda: te.multiply(packed(te, x), amax, 2688.0, packed(te, x), amax, 2688.0, across=True), "only tiles"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            attempt()
        assert "\n" not in str(refusal.value)


def packed(te: TransformerEngine, x: torch.Tensor, along: Any = "rows", **how: Any) -> Packed:
    rows, encoding = Rows((len(x),)), Encoding(along, **how)
    result = te.quantize(x, te.amax(x, rows, encoding), rows, encoding, packed=True)
    assert isinstance(result, Packed)
    return result


@pytest.mark.parametrize("bound", [448.0, 256.0])
def test_the_three_gemms_on_tensor_cores(stand_in: SimpleNamespace, bound: float) -> None:
    te = TransformerEngine()
    x, w, dy = operand(40, 80, 1), operand(48, 80, 2), operand(40, 48, 3)
    of = {name: t.abs().max().float().reshape(1) for name, t in (("x", x), ("w", w), ("dy", dy))}
    tiles = packed(te, w, "tiles", clipping="saturate" if bound == 448 else "4over6_mae", bound=bound)
    sides = {
        "fprop": ((packed(te, x), "x", False), (tiles, "w", False)),
        "dgrad": ((packed(te, dy), "dy", False), (tiles, "w", True)),
        "wgrad": ((packed(te, dy, "columns"), "dy", False), (packed(te, x, "columns"), "x", False)),
    }
    for name in GEMMS:
        (a, of_a, _), (b, of_b, across) = sides[name]
        right = bound if of_b == "w" else 448.0
        ours = te.multiply(a, of[of_a], 2688.0, b, of[of_b], 6 * right, across=across)
        left, other = (te.unpack(side, torch.float32).double() for side in (a, b))
        product = (left.T if name == "wgrad" else left) @ (other.T if name == "fprop" else other)
        expected = product * of[of_a].double() * of[of_b].double() / (36 * 448 * right)
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max(), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_scaling": "1d"},
        {"clipping": "4over6_mae", "e4m3_bound": 256, "hadamard": False},
        {"row_scaled": True, "hadamard": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(64,), (5, 0, 43)], ids=str)
def test_a_linear_layer_multiplies_four_bits(stand_in: SimpleNamespace, options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """y, dx and dW of a layer whose backend has a GEMM of its own; and it is that GEMM which runs."""
    wanted = form(stochastic_rounding=False, **options)
    tokens, groups = sum(sizes), len(sizes)
    calls = []

    class Counted(TransformerEngine):
        def multiply(self, *arguments: Any, **how: Any) -> torch.Tensor:
            calls.append(arguments)
            return super().multiply(*arguments, **how)

    results = []
    for backend in (Counted(), REFERENCE):
        x = operand(tokens, 64).requires_grad_()
        w = torch.stack([operand(48, 64, seed) for seed in range(groups)]).requires_grad_()
        keys = TokenKeys(torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens))
        here = site(backend=backend, first_expert=0 if groups > 1 else None)
        if groups > 1:
            y = grouped_linear(x, w, sizes, (wanted,) * 3, here, keys, 0)
        else:
            y = linear(x, w[0], (wanted,) * 3, here, keys, 0)
        y.backward(operand(tokens, 48, 9))
        assert x.grad is not None and w.grad is not None
        results.append((y.detach().float(), x.grad.float(), w.grad.float()))
    busy = sum(size > 0 for size in sizes)
    assert len(calls) == busy * (2 if options.get("row_scaled") else 3)  # an amax for every row is beyond the GEMM
    for name, ours, theirs in zip(("y", "dx", "dw"), *results, strict=True):
        # bf16 results of sums in another order: at most one rounding apart.
        assert (ours - theirs).abs().max() <= 2**-7 * theirs.abs().max(), name
        assert (ours != theirs).float().mean() < 0.02, name


# -- whole layers --------------------------------------------------------------------------------------------------------------------------


def three(backend: Any, formats: Any, *, microbatches: int = 1, fused: bool = True, weights: WeightCache | None = None) -> tuple[Any, ...]:
    """y of the last of some microbatches through one layer, dx, and the gradient of its weight in all of them."""
    x, w = operand(64, 96).requires_grad_(), torch.nn.Parameter(operand(32, 96, 1))
    if fused:
        w.main_grad = torch.zeros(32, 96)  # type: ignore[attr-defined]
    index = torch.arange(64)
    here = site(backend=backend, weights=weights or WeightCache())
    for microbatch in range(microbatches):
        x.grad = None
        y = linear(x, w, formats, here, TokenKeys(index, index), 0)
        y.backward(operand(64, 32, 2 + microbatch))
    assert x.grad is not None and w.grad is not None
    return y.detach(), x.grad, w.main_grad if fused else w.grad  # type: ignore[attr-defined]


def close(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    for name, a, b in zip(("y", "dx", "dw"), ours, theirs, strict=True):
        assert (a - b).abs().max() <= 2**-7 * b.abs().max(), name  # a rounding to bf16 apart
        assert (a != b).float().mean() < 0.02 or a.dtype == torch.float32, name


@pytest.mark.parametrize("fused", [True, False], ids=["main_grad", "grad"])
@pytest.mark.parametrize(
    "formats",
    [
        (form(stochastic_rounding=False),) * 3,
        (form(stochastic_rounding=False, hadamard=False, weight_scaling="1d"),) * 3,
        (NVFP4, BF16, BF16),
    ],
    ids=["whole", "other options", "forward only"],
)
def test_one_recipe_runs_as_a_layer_of_transformer_engine(stand_in: SimpleNamespace, formats: Any, fused: bool) -> None:
    WholeLinear.quantised_weights = 0
    ours = three(TransformerEngine(), formats, microbatches=3, fused=fused)
    assert WholeLinear.quantised_weights == 1, "once for all microbatches of a step"
    if formats[0].options.weight_scaling == "2d":  # along the other side, 1D weights have other scales, which the stand-in leaves out
        close(ours, three(REFERENCE, formats, microbatches=3, fused=fused))


def test_a_changed_weight_is_quantised_again(stand_in: SimpleNamespace) -> None:
    WholeLinear.quantised_weights = 0
    here = site(backend=TransformerEngine())
    w, index = torch.nn.Parameter(operand(32, 96, 1)), torch.arange(64)
    results = []
    for change in range(3):
        if change == 1:
            with torch.no_grad():
                w.mul_(-1)
        results.append(linear(operand(64, 96), w, (NVFP4,) * 3, here, TokenKeys(index, index), 0).detach())
    assert WholeLinear.quantised_weights == 2 and torch.equal(results[1], -results[0]) and torch.equal(results[2], results[1])
    here.weights.clear()  # as after every optimizer step
    linear(operand(64, 96), w, (NVFP4,) * 3, here, TokenKeys(index, index), 0)
    assert WholeLinear.quantised_weights == 3


@pytest.mark.parametrize("case", ["formats", "shape", "dtype", "output", "measured", "not quantised"])
def test_what_no_recipe_can_say_runs_operand_by_operand(stand_in: SimpleNamespace, case: str) -> None:
    WholeLinear.quantised_weights = 0
    formats = {"formats": (NVFP4, NVFP4, BF16), "not quantised": (BF16,) * 3}.get(
        case, (form(stochastic_rounding=False, hadamard=False),) * 3
    )
    tokens, dtype = 48 if case == "shape" else 64, torch.float32 if case == "dtype" else torch.bfloat16
    here, index = site(backend=TransformerEngine()), torch.arange(tokens)
    if case == "measured":
        here.health.start()
    out_dtype = torch.float32 if case == "output" else None
    x, w = operand(tokens, 96).to(dtype).requires_grad_(), torch.nn.Parameter(operand(32, 96, 1).to(dtype))
    y = linear(x, w, formats, here, TokenKeys(index, index), 0, out_dtype)  # type: ignore[arg-type]
    assert WholeLinear.quantised_weights == 0
    reference = linear(x, w, formats, site(), TokenKeys(index, index), 0, out_dtype)  # type: ignore[arg-type]
    assert (y - reference).abs().max() <= 2**-7 * reference.abs().max()


def test_the_certificate_reaches_whole_layers(stand_in: SimpleNamespace) -> None:
    WholeLinear.quantised_weights = 0
    report = Report()
    checks.check_gemms(report, TransformerEngine(), torch.device("cpu"))
    assert WholeLinear.quantised_weights == 2 and report.good, report.text()
