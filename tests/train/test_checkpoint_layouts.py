"""The real model: what every layout stores is the same, and every layout reads what any other stored."""

import pytest
import torch

from model.config import ModelConfig
from model.context import ModelContext
from model.hybrid import HybridModel
from model.precision.policy import Policy, PrecisionConfig
from model.stages import parts_of_stage, pipeline_parts
from parallel.engine import Engine
from parallel.engines import open_engine
from parallel.groups import initialize, shutdown
from parallel.layout import ParallelConfig
from train.checkpoint.boxes import Box
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.parts import Part
from train.checkpoint.reader import latest, open_checkpoint
from train.checkpoint.state import model_parts, optimizer_parts
from train.optimizer import OptimizerConfig, open_optimizer

CONFIG = ModelConfig.of(
    pattern="ME*-E/*E/*E",
    vocab_size=24,
    hidden_size=16,
    attention_heads=4,
    key_value_heads=2,
    head_dim=4,
    mamba_heads=4,
    mamba_head_dim=8,
    mamba_state_size=4,
    mamba_groups=2,
    ffn_hidden_size=24,
    experts=4,
    top_k=2,
    latent_size=8,
    expert_ffn_size=12,
    shared_expert_ffn_size=20,
)

LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tensor": (2, ParallelConfig(tensor=2)),
    "expert": (2, ParallelConfig(expert=2)),
    "pipeline": (2, ParallelConfig(pipeline=2)),
    "sharded": (2, ParallelConfig(distributed_optimizer=True)),
    "context sharded": (2, ParallelConfig(context=2, distributed_optimizer=True)),
    "virtual pipeline": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "expert x expert tensor": (4, ParallelConfig(expert=2, expert_tensor=2)),
    "tensor x expert tensor sharded": (4, ParallelConfig(tensor=2, expert_tensor=2, distributed_optimizer=True)),
    "pipeline sharded": (4, ParallelConfig(pipeline=2, distributed_optimizer=True)),
    "tensor x expert sharded": (4, ParallelConfig(tensor=2, expert=2, distributed_optimizer=True)),
}


def marked(part: Part) -> torch.Tensor:
    """Values that tell elements and tensors from one another: a hash of the name plus a function of global indices."""
    value = torch.full(part.box.shape, float(sum(i * b for i, b in enumerate(part.name.encode(), 1)) % 1009))
    for d, (offset, n) in enumerate(zip(part.box.offset, part.box.shape, strict=True)):
        index = torch.arange(offset, offset + n, dtype=torch.float32) * (0.5 + d) * 31 ** (d % 2)
        value += index.view([-1 if i == d else 1 for i in range(len(part.box.shape))])
    return value


def build(config: ParallelConfig) -> tuple[list[HybridModel], Engine]:
    layout = initialize(config, seed=0)
    policy = Policy(PrecisionConfig(default="fp32"), len(CONFIG.layers))
    context = ModelContext(CONFIG, layout, policy, 3, torch.float32, layout.device)
    parts = parts_of_stage(pipeline_parts(CONFIG, config, 64), layout.pipeline_size, layout.pipeline_rank)
    chunks = [HybridModel(context, part) for part in parts]
    return chunks, open_engine("megatron", chunks, layout, context.sizes, open_optimizer(OptimizerConfig(learning_rate=1e-3)))


def store(rank: int, directory: str, config: ParallelConfig) -> None:
    """Step 0: as initialised. Step 1: with a recognisable value in every element of weights and moments."""
    try:
        chunks, engine = build(config)
        checkpointer = Checkpointer(directory, engine, chunks)
        checkpointer.save(0, {})
        engine.make_room(lambda param, name: 1)
        with torch.no_grad():
            for part in (*model_parts(chunks), *optimizer_parts(engine.parameter_states())):
                part.tensor.copy_(marked(part))
        checkpointer.save(1, {})
    finally:
        shutdown(leave_world=False)


def resume(rank: int, directory: str, config: ParallelConfig) -> list[str]:
    """Names of parts that are not what `store` put there."""
    try:
        chunks, engine = build(config)
        checkpoint = Checkpointer(directory, engine, chunks).load_newest()
        assert checkpoint is not None and checkpoint.step == 1
        parts = [*model_parts(chunks), *optimizer_parts(engine.parameter_states())]
        assert len(parts) > 40 and all(state.numbers == {"step": 1} for state in engine.parameter_states())
        return [part.name for part in parts if not torch.equal(part.tensor, marked(part))]
    finally:
        shutdown(leave_world=False)


@pytest.fixture(scope="module")
def stored(ranks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    for name, (size, config) in LAYOUTS.items():
        ranks(size)(store, str(directory / name), config)
    return directory


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_initial_weights_and_names_do_not_depend_on_the_layout(stored, name):
    expected = open_checkpoint(stored / "one" / "checkpoints" / "step-00000000")
    got = open_checkpoint(stored / name / "checkpoints" / "step-00000000")
    assert got.names() == expected.names()
    for tensor in expected.names():
        assert torch.equal(got.read_full(tensor), expected.read_full(tensor)), tensor


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_stores_every_element_where_it_belongs(stored, name):
    checkpoint = latest(stored / name / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 1
    for kind in ("exp_avg", "exp_avg_sq"):
        weights = [n for n in checkpoint.names("model") if not n.endswith("e_score_correction_bias")]
        assert checkpoint.names(kind) == weights
    for tensor in checkpoint.names():
        if tensor != "step":
            value = checkpoint.read_full(tensor)
            box = Box((0,) * value.dim(), tuple(value.shape))
            assert torch.equal(value, marked(Part(tensor, box.shape, box, value))), tensor


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize(
    "source",
    [
        "tensor x expert sharded",
        "virtual pipeline",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pipeline sharded", "tensor x expert tensor sharded")),
    ],
)
def test_every_layout_resumes_from_any_other(ranks, stored, source, target):
    size, config = LAYOUTS[target]
    assert ranks(size)(resume, str(stored / source), config) == [[]] * size
