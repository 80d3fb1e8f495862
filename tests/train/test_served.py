"""What is exported is what servers read: names, shapes and keys of the published models to the number, and every tensor consumed by a loader that
follows vLLM's rules."""

import json
import re
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, train_bpe
from model.config import ModelConfig
from parallel import groups
from tests.train import served
from tests.train.recipes import recipe
from train.build import build_model
from train.checkpoint.checkpointer import CHECKPOINTS
from train.checkpoint.reader import Checkpoint, open_checkpoint
from train.checkpoint.state import model_parts
from train.checkpoint.writer import save
from train.export import main
from train.huggingface.config import hugging_face_config, model_config
from train.huggingface.export import export
from train.huggingface.load import import_hf
from train.huggingface.names import dtype_on_disk, from_hugging_face, shapes, shapes_on_disk, to_hugging_face
from train.recipe.load import load_recipe
from train.recipe.reading import plain

PUBLISHED = ("nemotron3_super", "nemotron3_5_lightning")
UNSHARED = ("model.pattern='ME*-E/*E/*E'", "model.mtp_shared=false", "model.ffn_hidden_size=48")


@cache
def published(name: str) -> ModelConfig:
    return load_recipe(name, world_size=None).model


@cache
def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return shapes_on_disk(published(name))


def on_disk(directory: Path) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return tensors


def untrained(run_dir: Path, *overrides: str, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """A run directory with one checkpoint, of random weights: no two tensors are alike, and none is what a model begins with."""
    made = recipe(*(() if any(o.startswith("precision") for o in overrides) else ("precision=fp32",)), *overrides)
    try:
        _, chunks = build_model(made, groups.initialize(made.parallel, 1))
        generator = torch.Generator().manual_seed(1)
        for tensor in chunks[0].state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        save(run_dir / CHECKPOINTS, 0, list(model_parts(chunks)), {})
    finally:
        groups.shutdown()
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(plain(made)))
    tokenizer = tokenizer or ByteTokenizer()
    tokenizer.save(run_dir / "tokenizer")
    facts = {"end_of_document": tokenizer.end_of_document, "vocab_size": tokenizer.vocab_size}
    (run_dir / "tokenizer" / "facts.json").write_text(json.dumps(facts))
    return made.model


@pytest.mark.parametrize(
    ("name", "tensors", "elements", "mtp", "biases", "nbytes"),
    [
        ("nemotron3_super", 42_683, 123_611_033_088, 1_040, 41, 247_222_108_160),
        ("nemotron3_5_lightning", 6_513, 32_913_266_240, 270, 24, 65_826_538_624),
    ],
)
def test_published_checkpoints_to_the_tensor(name: str, tensors: int, elements: int, mtp: int, biases: int, nbytes: int) -> None:
    found = {key: (torch.Size(shape).numel(), dtype_on_disk(key, torch.bfloat16)) for key, shape in shapes_of(name).items()}
    assert len(found) == tensors
    assert sum(count for count, _ in found.values()) == elements
    assert sum(key.startswith("mtp.") for key in found) == mtp
    assert sum(dtype == torch.float32 for _, dtype in found.values()) == biases
    assert sum(count * dtype.itemsize for count, dtype in found.values()) == nbytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_server_consumes_every_tensor_of_the_published_models(name: str) -> None:
    config = hugging_face_config(published(name), dtype="bfloat16", sequence_length=8192, end_of_document=2)
    assert served.target(config, shapes_of(name)) == []
    assert served.draft(config, shapes_of(name)) == []


def test_a_server_complains_of_other_names_and_shapes() -> None:
    name = "nemotron3_5_lightning"
    config = hugging_face_config(published(name), dtype="bfloat16", sequence_length=8192, end_of_document=2)
    nested = served.draft(config, shapes(published(name)))  # our own names
    assert "model.layers.0.hidden_norm.weight has no place" in nested and "model.layers.0.hnorm.weight lacks None" in nested
    assert any("experts.w13_weight lacks ('w1', 127)" in complaint for complaint in served.target(config | {"n_routed_experts": 128}, {}))
    assert any("is (2688,) and not (1024,)" in complaint for complaint in served.target(config | {"hidden_size": 1024}, shapes_of(name)))


def test_names_of_the_mtp_block() -> None:
    pairs = {
        "mtp.layers.0.embedding_norm.weight": "mtp.layers.0.enorm.weight",
        "mtp.layers.0.hidden_norm.weight": "mtp.layers.0.hnorm.weight",
        "mtp.layers.0.eh_proj.weight": "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.layers.0.norm.weight": "mtp.layers.0.norm.weight",
        "mtp.layers.0.layers.0.mixer.q_proj.weight": "mtp.layers.0.mixer.q_proj.weight",
        "mtp.layers.0.layers.1.norm.weight": "mtp.layers.1.norm.weight",
        "mtp.layers.0.layers.1.mixer.gate.e_score_correction_bias": "mtp.layers.1.mixer.gate.e_score_correction_bias",
        "mtp.layers.0.layers.1.mixer.experts.7.up_proj.weight": "mtp.layers.1.mixer.experts.7.up_proj.weight",
        "mtp.layers.0.final_norm.weight": "mtp.layers.1.final_layernorm.weight",
        "mtp.layers.1.embedding_norm.weight": "mtp.layers.2.enorm.weight",
        "mtp.layers.1.layers.1.mixer.shared_experts.up_proj.weight": "mtp.layers.3.mixer.shared_experts.up_proj.weight",
        "mtp.layers.1.final_norm.weight": "mtp.layers.3.final_layernorm.weight",
    }
    for ours, theirs in pairs.items():
        assert to_hugging_face(ours, 2) == theirs
        assert from_hugging_face(theirs, 2) == ours


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    untrained(directory, "model.pattern='ME*-E/*E/*E'", "model.ffn_hidden_size=48")
    return directory


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "bf16"
    export(
        open_checkpoint(run_dir), directory, dtype="bf16", readers=["vllm", "sglang", "megatron_bridge", "transformers"], shard_bytes=40_000
    )
    return directory


def test_a_server_consumes_an_exported_run(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert served.target(config, on_disk(exported)) == []
    assert served.draft(config, on_disk(exported)) == []
    assert config["hybrid_override_pattern"] == "ME*-E" and config["mtp_hybrid_override_pattern"] == "*E"
    assert config["num_hidden_layers"] == 5 and config["num_nextn_predict_layers"] == 1 and config["mtp_use_repeated_layer"] is True
    assert config["moe_latent_size"] == 16 and config["mtp_loss_scaling_factor"] == 0.3 and config["dtype"] == "bfloat16"
    # The names SGLang's configuration allows; transformers reads them as its own.
    assert config["layers_block_type"] == ["mamba", "moe", "attention", "mlp", "moe"] and config["mtp_layers_block_type"] == [
        "attention",
        "moe",
    ]
    theirs = AutoConfig.from_pretrained(exported)
    assert (theirs.hybrid_override_pattern, theirs.mtp_hybrid_override_pattern) == ("ME*-E", "*E")


def test_bf16_in_shards_is_the_rounded_checkpoint_bit_for_bit(run_dir: Path, exported: Path, tmp_path: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    sizes = {path.name: sum(tensor.nbytes for tensor in load_file(path).values()) for path in exported.glob("*.safetensors")}
    assert len(sizes) > 3 and set(index["weight_map"].values()) == set(sizes) and max(sizes.values()) <= 40_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert {path.stat().st_mode for path in exported.glob("*.safetensors")} == {(exported / "config.json").stat().st_mode}
    import_hf(exported, tmp_path / "again")
    original, again = open_checkpoint(run_dir), open_checkpoint(tmp_path / "again")
    assert original.names() == again.names()
    for name in original.names():
        wanted = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert torch.equal(again.read_full(name), original.read_full(name).to(wanted)) and again.read_full(name).dtype == wanted, name


def test_one_shard_is_in_memory_at_a_time(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = Checkpoint.read_full

    def read_full(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(checkpoint, name)
        live.append(weakref.ref(tensor))
        most = max(most, sum(held.nbytes for each in live if (held := each()) is not None))
        return tensor

    monkeypatch.setattr(Checkpoint, "read_full", read_full)
    export(open_checkpoint(run_dir), tmp_path / "out", shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3 and 0 < most <= 60_000


# Where Megatron-Bridge's `nemotron_h_bridge.py` looks, * being a number; it flattens MTP the same way.
LAYER = """norm mixer.up_proj mixer.down_proj mixer.o_proj mixer.q_proj mixer.k_proj mixer.v_proj mixer.gate mixer.fc1_latent_proj
mixer.fc2_latent_proj mixer.shared_experts.up_proj mixer.shared_experts.down_proj mixer.experts.*.up_proj mixer.experts.*.down_proj""".split()
MAIN = [f"backbone.layers.*.{name}.weight" for name in (*LAYER, "mixer.in_proj", "mixer.out_proj", "mixer.norm", "mixer.conv1d")] + [
    *(f"backbone.layers.*.mixer.{name}" for name in ("A_log", "D", "dt_bias", "conv1d.bias", "gate.e_score_correction_bias")),
    *("backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"),
]
MTP = [f"mtp.layers.*.{name}.weight" for name in (*LAYER, "eh_proj", "enorm", "hnorm", "final_layernorm")]
MTP.append("mtp.layers.*.mixer.gate.e_score_correction_bias")


def test_megatron_bridge_knows_every_name() -> None:
    known = [re.compile(re.escape(name).replace(r"\*", r"\d+")) for name in MAIN + MTP]
    names = shapes_of("nemotron3_super")
    assert [name for name in names if not any(pattern.fullmatch(name) for pattern in known)] == []
    # A pattern no name has would only be a slip of this list; `-` layers are in none of the published models.
    assert all(
        any(pattern.fullmatch(name) for name in names) for pattern in known if not re.search(r"mixer\\\.(up|down)_proj", pattern.pattern)
    )


LISTS, PATTERNS = ("layers_block_type", "mtp_layers_block_type"), ("hybrid_override_pattern", "mtp_hybrid_override_pattern")
OTHER = {"mamba": "linear_attention", "attention": "full_attention"}


@pytest.mark.parametrize(
    "spelt",
    [
        pytest.param(lambda config: {key: value for key, value in config.items() if key not in LISTS}, id="letters"),
        pytest.param(lambda config: {key: value for key, value in config.items() if key not in PATTERNS}, id="names"),
        pytest.param(lambda config: config | {key: [OTHER.get(kind, kind) for kind in config[key]] for key in LISTS}, id="newer names"),
    ],
)
def test_import_takes_either_spelling(spelt: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    model = published("nemotron3_super")
    config = hugging_face_config(model, dtype="bfloat16", sequence_length=8192, end_of_document=2)
    assert plain(model_config(spelt(config), 2)) == plain(model)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hybrid_override_pattern": "ME"}, "says two things of the layers: layers_block_type says .*, hybrid_override_pattern says 'ME'"),
        ({"mamba_n_groups": 4}, "n_groups=8 and mamba_n_groups=4"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2 depths of '\\*E', but 2 layers under mtp.layers"),
    ],
)
def test_a_config_that_contradicts_itself(changed: dict[str, Any], said: str) -> None:
    config = hugging_face_config(published("nemotron3_super"), dtype="bfloat16", sequence_length=8192, end_of_document=2)
    with pytest.raises(ValueError, match=said):
        model_config(config | changed, 2)


def test_a_checkpoint_that_lacks_a_tensor(exported: Path, tmp_path: Path) -> None:
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = next(path for path in tmp_path.glob("*.safetensors") if any("enorm" in name for name in load_file(path)))
    save_file({name: tensor for name, tensor in load_file(path).items() if "enorm" not in name}, path)
    with pytest.raises(ValueError, match=r"has no tensor mtp.layers.0.embedding_norm.weight: copy it again"):
        import_hf(tmp_path, tmp_path / "run")


def test_depths_of_their_own_are_written_for_us_and_refused_for_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = untrained(tmp_path / "run", *UNSHARED)
    assert main([f"checkpoint={tmp_path / 'run'}", f"to={tmp_path / 'out'}", "readers=[transformers,vllm]"]) == 2
    refused = capsys.readouterr().err
    assert "model.mtp_shared=false with 2 MTP depths gives num_nextn_predict_layers=2, and vllm drafts with one block only" in refused
    assert not (tmp_path / "out").exists()
    assert main([f"checkpoint={tmp_path / 'run'}", f"to={tmp_path / 'out'}", "readers=megatron_bridge"]) == 0
    told = capsys.readouterr().out
    assert "Read by transformers, megatron_bridge" in told and "Not all of it is for vllm" in told and "is for sglang" in told
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 2 and config["mtp_use_repeated_layer"] is False
    assert served.draft(config, on_disk(tmp_path / "out")) == ["Only one MTP layer is supported for NemotronH-MTP"]
    assert {name.split(".")[2] for name in on_disk(tmp_path / "out") if name.startswith("mtp.")} == {"0", "1", "2", "3"}
    import_hf(tmp_path / "out", tmp_path / "again")
    assert plain(ModelConfig.of(**yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["model"])) == plain(model)


def test_transformers_reads_the_ids_the_model_was_trained_on(run_dir: Path, tmp_path: Path) -> None:
    text = "It is a truth <|endoftext|> universally acknowledged, Mr. Wöodhouse 1234!\n  <s>"
    trained = train_bpe([text.encode()], 300, "<|endoftext|>")
    trained.add_special_tokens(["<s>"])
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", trained.token_to_id("<s>"))])
    trained.enable_truncation(5)
    trained.save(str(tmp_path / "tokenizer.json"))
    ours = FileTokenizer(tmp_path / "tokenizer.json", "<|endoftext|>")
    untrained(tmp_path / "run", "model.vocab_size=320", tokenizer=ours)
    export(open_checkpoint(tmp_path / "run"), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text).input_ids == ours.encode(text).tolist()
    assert theirs.decode(theirs(text).input_ids) == text and theirs.eos_token_id == ours.end_of_document
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == ours.end_of_document and generation.suppress_tokens == list(range(ours.vocab_size, 320))
    assert re.search("split_special", (tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a truth").ids == ours.encode("a truth").tolist()
