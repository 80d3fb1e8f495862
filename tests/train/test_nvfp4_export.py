"""NVFP4 weights on disk are what training multiplied, as compressed-tensors itself reads them, and text made with them is our own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.linear import Linear
from model.moe import Experts
from model.precision.nvfp4 import quantize
from parallel import groups
from parallel.shards import pieces_of
from tests.train import served
from tests.train.test_served import on_disk, untrained
from train.checkpoint.reader import open_checkpoint
from train.export import main
from train.generation.sampling import Sampling
from train.generation.speaker import open_speaker
from train.generation.texts import generate
from train.huggingface.export import export
from train.huggingface.load import import_hf
from train.huggingface.names import to_hugging_face
from train.huggingface.nvfp4 import LAYOUTS, Layout

MODEL = ("model.pattern='ME*-EMEM/*E/*E'", "model.ffn_hidden_size=48")
# Weights in 16 x 16 tiles and in rows, with the usual choice of scales and with 4over6, beside MXFP8 and bf16.
PRECISIONS: dict[str, dict[str, Any]] = {
    "nvfp4": {"scaling": "2d"},
    "nvfp4_1d": {"scaling": "1d"},
    "nvfp4_4over6": {"scaling": "2d", "clipping": "4over6_mae", "e4m3_bound": 256},
}
PACKED, SCALE, GLOBAL = LAYOUTS["nvfp4"].packed, LAYOUTS["nvfp4"].scale, LAYOUTS["nvfp4"].whole
MODELOPT = LAYOUTS["nvfp4_modelopt"]


def written(run_dir: Path, *overrides: str) -> Path:
    untrained(run_dir, *MODEL, *overrides)
    return run_dir


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def multiplied(run_dir: Path) -> dict[str, Tensor]:
    """By their names on disk, the weights `weights=rounded` makes texts with."""
    speaker = open_speaker(open_checkpoint(run_dir), "fp32", "rounded")
    try:
        found: dict[str, Tensor] = {}
        for module in speaker.model.modules():
            for _, weight in module.weights() if isinstance(module, Linear | Experts) else ():
                for piece in pieces_of(weight):
                    part = weight.detach()[piece.local]
                    whole = found.setdefault(to_hugging_face(piece.name, 2), torch.empty(piece.shape))
                    whole[piece.offset[0] : piece.offset[0] + len(part)] = part
        return found
    finally:
        groups.shutdown()


def greedy(run_dir: Path, precision: str, weights: str) -> list[int]:
    speaker = open_speaker(open_checkpoint(run_dir), precision, weights)
    try:
        return [token for (token,) in generate(speaker, [list(b"It is a truth")], 60, Sampling(temperature=0)) if token is not None]
    finally:
        groups.shutdown()


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[] if name == "nvfp4" else pytest.mark.slow) for name in PRECISIONS])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp(request.param) / "run", f"precision={request.param}")


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    export(open_checkpoint(run_dir), run_dir.parent / "packed", format="nvfp4", readers=["vllm", "sglang"], shard_bytes=60_000)
    return run_dir.parent / "packed"


def test_every_layer_is_packed_or_named(exported: Path) -> None:
    config, tensors = json.loads((exported / "config.json").read_text()), tensors_of(exported)
    quantized = config["quantization_config"]
    assert (quantized["quant_method"], quantized["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    packed = {name.removesuffix(f".{PACKED}") for name in tensors if name.endswith(PACKED)}
    ignored = {name for name in quantized["ignore"] if not name.endswith("gate_proj")}
    assert packed and ignored and not packed & ignored
    for name in ignored:
        assert tensors[f"{name}.weight"].dtype == torch.bfloat16
    for name in packed:
        rows, half = tensors[f"{name}.{PACKED}"].shape
        assert tensors[f"{name}.{PACKED}"].dtype == torch.uint8
        assert (tensors[f"{name}.{SCALE}"].dtype, tensors[f"{name}.{SCALE}"].shape) == (torch.float8_e4m3fn, (rows, half // 8))
        assert (tensors[f"{name}.{GLOBAL}"].dtype, tensors[f"{name}.{GLOBAL}"].shape) == (torch.float32, (1,))
    # Layer 6 is one of the last, which the policy leaves in bf16; vLLM asks for the scheme of a gate that its experts have not.
    assert (
        "backbone.layers.6.mixer.experts.0.gate_proj" in quantized["ignore"]
        and "backbone.layers.1.mixer.experts.0.gate_proj" not in quantized["ignore"]
    )
    # What a server knows of the layers is otherwise as ever.
    shapes = {name: shape for name, shape in on_disk(exported).items() if not name.endswith((PACKED, SCALE, GLOBAL))}
    shapes |= {f"{name}.weight": (tensors[f"{name}.{PACKED}"].shape[0], 2 * tensors[f"{name}.{PACKED}"].shape[1]) for name in packed}
    assert served.target(config, shapes) == [] and served.draft(config, shapes) == []


def test_codes_and_scales_are_those_of_the_definition(run_dir: Path, exported: Path, request: pytest.FixtureRequest) -> None:
    checkpoint, tensors = open_checkpoint(run_dir), tensors_of(exported)
    names = {to_hugging_face(name, 2): name for name in checkpoint.names("model")}
    for name in [name.removesuffix(f".{PACKED}") for name in tensors if name.endswith(PACKED)]:
        defined = quantize(checkpoint.read_full(f"model/{names[f'{name}.weight']}"), **PRECISIONS[request.node.callspec.params["run_dir"]])
        assert torch.equal(tensors[f"{name}.{PACKED}"], defined.codes), name
        assert torch.equal(tensors[f"{name}.{SCALE}"].view(torch.uint8), defined.scales), name
        assert torch.equal(tensors[f"{name}.{GLOBAL}"], torch.div(torch.tensor(6 * defined.bound), defined.amax).view(1)), name


def test_compressed_tensors_reads_what_training_multiplied(run_dir: Path, exported: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed: the extra nvfp4 has it")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_named_modules

    quantized = QuantizationConfig.model_validate(json.loads((exported / "config.json").read_text())["quantization_config"])
    scheme = quantized.config_groups["group_0"]
    tensors, expected = tensors_of(exported), multiplied(run_dir)
    reader = BaseCompressor.get_value_from_registry(quantized.format)
    packed = [name.removesuffix(f".{PACKED}") for name in tensors if name.endswith(PACKED)]
    for name in packed:
        parts = {kind: tensors[f"{name}.{kind}"] for kind in (PACKED, SCALE, GLOBAL)}
        values = reader.decompress(parts, scheme)["weight"]
        assert values.dtype == torch.bfloat16 and torch.equal(values, expected[f"{name}.weight"].bfloat16()), name
    # Of all linear layers the configuration takes those that are packed, and no other.
    model = torch.nn.Module()
    for name in {key.removesuffix(".weight") for key in expected}:
        parent = model
        for step in name.split(".")[:-1]:
            if step not in dict(parent.named_children()):
                parent.add_module(step, torch.nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(name.split(".")[-1], torch.nn.Linear(1, 1, bias=False))
    assert {name for name, _ in match_named_modules(model, scheme.targets, quantized.ignore)} == set(packed)


def test_what_is_not_packed_is_bf16_of_what_was_multiplied(run_dir: Path, exported: Path) -> None:
    tensors, expected = tensors_of(exported), multiplied(run_dir)
    plain = [name for name in expected if name in tensors]
    assert len(plain) > 10
    for name in plain:
        assert torch.equal(tensors[name], expected[name].bfloat16()), name


@pytest.mark.parametrize(("precision", "dtype"), [pytest.param("bf16", None, marks=pytest.mark.slow), ("fp32", "fp32")])
def test_text_of_the_reimported_export_is_our_own(run_dir: Path, precision: str, dtype: str | None, tmp_path: Path) -> None:
    export(open_checkpoint(run_dir), tmp_path / "packed", format="nvfp4", dtype=dtype)
    import_hf(tmp_path / "packed", tmp_path / "again")
    again, expected = open_checkpoint(tmp_path / "again"), multiplied(run_dir)
    if dtype == "fp32":
        for name in again.names("model"):
            if to_hugging_face(name, 2) in expected:
                assert torch.equal(again.read_full(f"model/{name}"), expected[to_hugging_face(name, 2)]), name
    text = greedy(tmp_path / "again", precision, "stored")
    assert text == greedy(run_dir, precision, "rounded")
    assert text != greedy(run_dir, precision, "stored"), "rounding changes nothing here, so nothing was shown"


@pytest.fixture(scope="module")
def for_modelopt(run_dir: Path) -> Path:
    export(open_checkpoint(run_dir), run_dir.parent / "modelopt", format="nvfp4_modelopt", readers=["vllm", "sglang"], shard_bytes=60_000)
    return run_dir.parent / "modelopt"


def parts_of(tensors: dict[str, Tensor], layout: Layout) -> dict[str, dict[str, Tensor]]:
    """By module."""
    modules = [name.removesuffix(f".{layout.whole}") for name in tensors if name.endswith(f".{layout.whole}")]
    return {module: {kind: tensors[f"{module}.{kind}"] for kind in (layout.packed, layout.scale, layout.whole)} for module in modules}


def test_modelopts_layout_has_the_same_codes_and_scales(exported: Path, for_modelopt: Path) -> None:
    config = json.loads((for_modelopt / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_algo"], config["group_size"]) == ("modelopt", "W4A16_NVFP4", 16)
    assert config["ignore"] == json.loads((exported / "config.json").read_text())["quantization_config"]["ignore"]
    ours, theirs = parts_of(tensors_of(exported), LAYOUTS["nvfp4"]), parts_of(tensors_of(for_modelopt), MODELOPT)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for module, parts in theirs.items():
        assert torch.equal(parts["weight"], ours[module][PACKED]) and parts["weight"].dtype == torch.uint8, module
        assert torch.equal(parts["weight_scale"].view(torch.uint8), ours[module][SCALE].view(torch.uint8)), module
        assert parts["weight_scale_2"].shape == () and parts["weight_scale_2"] == 1 / ours[module][GLOBAL]
    rest = {name: tensor for name, tensor in tensors_of(for_modelopt).items() if name.rpartition(".")[0] not in theirs}
    assert all(torch.equal(tensor, tensors_of(exported)[name]) for name, tensor in rest.items())


def test_modelopt_reads_what_training_multiplied(run_dir: Path, for_modelopt: Path) -> None:
    nvfp4_tensor = pytest.importorskip("modelopt.torch.quantization.qtensor", reason="the package nvidia-modelopt is not installed")
    expected = multiplied(run_dir)
    for module, parts in parts_of(tensors_of(for_modelopt), MODELOPT).items():
        shape = expected[f"{module}.weight"].shape
        packed = nvfp4_tensor.NVFP4QTensor(shape, torch.float32, parts["weight"])
        given = {"scale": parts["weight_scale"], "double_scale": parts["weight_scale_2"], "block_sizes": {-1: 16}}
        values = packed.dequantize(torch.float32, **given)
        torch.testing.assert_close(values, expected[f"{module}.weight"], rtol=2**-22, atol=0)
        assert torch.equal(values, MODELOPT.values(parts)), module


def test_an_import_takes_modelopts_layout_too(run_dir: Path, for_modelopt: Path, tmp_path: Path) -> None:
    import_hf(for_modelopt, tmp_path / "again")
    again, expected = open_checkpoint(tmp_path / "again"), multiplied(run_dir)
    packed = parts_of(tensors_of(for_modelopt), MODELOPT)
    for name in again.names("model"):
        module = to_hugging_face(name, 2).removesuffix(".weight")
        if module in packed:
            torch.testing.assert_close(again.read_full(f"model/{name}"), expected[f"{module}.weight"], rtol=2**-22, atol=0)


def test_wrong_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = written(tmp_path / "run", "precision=bf16")

    def said(*arguments: str) -> str:
        assert main([f"checkpoint={run_dir}", f"to={tmp_path / 'out'}", *arguments]) == 2
        return capsys.readouterr().err

    assert "format=nvfp4 is for weights trained in NVFP4: no module of" in said("format=nvfp4")
    assert "format=gguf is unknown: use nvfp4 or nvfp4_modelopt" in said("format=gguf")
    assert "dtype=fp8 is unknown: use bf16 or fp32" in said("dtype=fp8")
    assert "format=nvfp4 packs experts in a way transformers does not read" in said("format=nvfp4", "readers=transformers")
    assert "format=nvfp4 packs weights in a way megatron_bridge does not read" in said("format=nvfp4", "readers=[vllm,megatron_bridge]")
    assert "format=nvfp4_modelopt packs weights in a way transformers does not" in said("format=nvfp4_modelopt", "readers=transformers")
    assert "readers=tgi is unknown: use some of transformers, vllm" in said("readers=tgi")
    assert not (tmp_path / "out").exists()


def test_weights_quantised_otherwise_are_not_imported(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for path in exported.iterdir():
        (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "modelopt", "quant_algo": "FP8"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'quant_algo': 'FP8'.*: only NVFP4 weights as compressed-tensors .* can be imported"):
        import_hf(tmp_path / "hf", tmp_path / "run")
