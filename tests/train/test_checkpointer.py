"""Saving and restoring model, optimizer and loop state together, with a stand-in for the engine."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parallel.engine import ParameterState
from parallel.shards import Piece, set_pieces
from train.checkpoint.checkpointer import Checkpointer, load_weights
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.reader import open_checkpoint


class Model(nn.Module):
    """A fused parameter of two stored tensors, a norm, and the router's bias buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32, extra: bool = False):
        super().__init__()
        self.fused = nn.Parameter(torch.randn(6, 4).to(dtype))
        set_pieces(self.fused, [Piece("q", (4, 4), (0, 0), (slice(0, 4),)), Piece("k", (2, 4), (0, 0), (slice(4, 6),))])
        self.norm = nn.Parameter(torch.ones(4))
        set_pieces(self.norm, [Piece("norm.weight", (4,), (0,), ())])
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(3))
        set_pieces(self.bias, [Piece("gate.e_score_correction_bias", (3,), (0,), ())])
        self.register_buffer("scratch", torch.zeros(5), persistent=False)
        if extra:
            self.extra = nn.Parameter(torch.zeros(2))
            set_pieces(self.extra, [Piece("extra", (2,), (0,), ())])

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.norm) @ self.fused.float().t()).pow(2).mean() + self.bias.sum()


class Engine:
    """AdamW on fp32 masters; with `flat`, its state appears as two flat shards, as the distributed optimizer's."""

    def __init__(self, model: nn.Module, flat: bool = False):
        self.params = list(model.parameters())
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        self.adam = torch.optim.AdamW(self.masters, lr=1e-2)
        self.flat = flat

    def step(self, loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, self.params)
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad.float()
        self.adam.step()
        with torch.no_grad():
            for param, master in zip(self.params, self.masters, strict=True):
                if master is not param:
                    param.copy_(master)

    def make_room(self, number: Callable[[nn.Parameter, str], float]) -> None:
        for param, master in zip(self.params, self.masters, strict=True):
            moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[master] = {"step": torch.tensor(float(number(param, "step"))), **moments}

    def settle(self) -> None: ...

    def parameter_states(self) -> list[ParameterState]:
        states = []
        for param, master in zip(self.params, self.masters, strict=True):
            adam = dict(self.adam.state.get(master, {}))
            numbers: dict[str, float] = {"step": int(adam.pop("step"))} if adam else {}
            held = {"master": master.detach(), **adam}
            cuts = [0, param.numel() // 3, param.numel()]
            for start, stop in itertools.pairwise(cuts) if self.flat else [(0, 0)]:
                views = {name: t.view(-1)[start:stop] if self.flat else t for name, t in held.items()}
                own = views.pop("master")
                states.append(ParameterState(param, None if master is param else own, views, numbers, (start, stop) if self.flat else None))
        return states


def train(model: Model, engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step)))
        engine.step(loss)
        model.bias += 0.01 * (step + 1)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flat", [(False, False), (True, True), (False, True), (True, False)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, dtype, flat):
    torch.manual_seed(1)
    model = Model(dtype)
    engine = Engine(model, flat[0])
    train(model, engine, range(3))
    Checkpointer(tmp_path, engine, [model]).save(3, {"loop": {"best": 1.5}}, tokens=96)
    expected = train(model, engine, range(3, 7))

    torch.manual_seed(2)
    again = Model(dtype)
    engine = Engine(again, flat[1])
    checkpoint = Checkpointer(tmp_path, engine, [again]).load_newest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.tokens, checkpoint.state) == (3, 96, {"loop": {"best": 1.5}})
    assert train(again, engine, range(3, 7)) == expected
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    masters = ["master/k", "master/q"] if dtype == torch.bfloat16 else []
    weights = ["gate.e_score_correction_bias", "k", "norm.weight", "q"]
    assert checkpoint.names() == sorted(
        [f"model/{n}" for n in weights] + [f"{kind}/{n}" for kind in ("exp_avg", "exp_avg_sq") for n in weights[1:]] + masters + ["step"]
    )


def test_before_the_first_optimizer_step_there_are_no_moments(tmp_path):
    model = Model()
    Checkpointer(tmp_path, Engine(model), [model]).save(0, {})
    again = Model()
    checkpoint = Checkpointer(tmp_path, Engine(again), [again]).load_newest()
    assert checkpoint is not None and not checkpoint.names("exp_avg")
    assert torch.equal(model.fused, again.fused)


def test_nothing_to_restore(tmp_path):
    model = Model()
    assert Checkpointer(tmp_path, Engine(model), [model]).load_newest() is None


def test_weights_alone(tmp_path):
    model = Model()
    engine = Engine(model)
    train(model, engine, range(2))
    Checkpointer(tmp_path, engine, [model]).save(2, {})
    again = Model()
    load_weights(open_checkpoint(tmp_path), [again])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_tensor_without_pieces_cannot_be_saved(tmp_path):
    model = Model()
    model.register_buffer("bias", torch.zeros(3))
    with pytest.raises(CheckpointError, match="bias has no pieces"):
        Checkpointer(tmp_path, Engine(model), [model]).save(1, {})


def test_numbers_that_differ_are_kept_for_each_parameter(tmp_path):
    model = Model()
    engine = Engine(model)
    train(model, engine, range(1))
    engine.adam.state[model.norm]["step"] += 4
    Checkpointer(tmp_path, engine, [model]).save(1, {})
    checkpoint = open_checkpoint(tmp_path)
    assert [n for n in checkpoint.names() if n.startswith("step")] == ["step/k", "step/norm.weight", "step/q"]
    again = Model()
    resumed = Engine(again)
    Checkpointer(tmp_path, resumed, [again]).load_newest()
    assert [state.numbers["step"] for state in resumed.parameter_states()] == [1, 5]
    assert train(again, resumed, range(1, 3)) == train(model, engine, range(1, 3))


@pytest.mark.parametrize("stored, words", [(False, "has no tensor model/extra"), (True, "it holds exp_avg/extra and 2")])
def test_a_run_that_holds_other_tensors_is_refused(tmp_path, stored, words):
    model = Model(extra=stored)
    engine = Engine(model)
    engine.make_room(lambda param, name: 1)
    Checkpointer(tmp_path, engine, [model]).save(1, {})
    again = Model(extra=not stored)
    before = again.fused.clone()
    with pytest.raises(CheckpointError) as error:
        Checkpointer(tmp_path, Engine(again), [again]).load_newest()
    assert words in str(error.value) and "cannot resume from" in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(before, again.fused)


def test_a_run_in_another_dtype_is_refused(tmp_path):
    model = Model()
    Checkpointer(tmp_path, Engine(model), [model]).save(1, {})
    again = Model(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"model/q is torch\.float32"):
        Checkpointer(tmp_path, Engine(again), [again]).load_newest()
