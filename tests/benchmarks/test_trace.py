"""A step on a pretended GPU, in a process of its own: there is no way back from pretending."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.ledger import Ledger
from benchmarks.pretended_cuda import DEVICE, compiler
from benchmarks.trace import OPTIMIZER, REST, Trace, trace
from model.count import count, linear_modules
from parallel.cluster import ClusterConfig, PeakFlops
from train.recipe.load import RECIPES, load_recipe

pytestmark = pytest.mark.skipif(compiler() is None, reason="pretending a GPU needs a C++ compiler")
SMALL = ("train.micro_batch_size=1", "precision.compute=bf16")
EVERYTHING = ("data.reset_at_document=true", "monitor.quantization.every=1", "parallel.recompute=[norm,activation,moe,head,mamba]")
GROUPS = sorted(path.stem for path in (RECIPES / "precision").glob("*.yaml"))
WHOLE = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def pretend() -> None:
    DEVICE.pretend()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), pretend) as pool:
        yield pool


def traced(name: str, overrides: tuple[str, ...], ranks: int | None) -> Trace:
    recipe = load_recipe(name, *overrides, world_size=ranks)
    return trace(recipe, ranks or recipe.parallel.fewest_ranks())


def assert_waits(found: Trace) -> None:
    """A mixture of experts must learn how many rows it gets, once, also where it is computed again; nothing else in the model waits."""
    waits = {kind: account.waits for kind, account in found.accounts.items() if kind not in (OPTIMIZER, REST) and account.waits}
    assert waits == {kind: found.accounts[kind].calls for kind in ("MoE", "MTP block") if kind in found.accounts}, found.waited


def few(pattern: str) -> str:
    """The shortest beginning of the stack with a layer of every kind, and the MTP depths."""
    stack, *depths = pattern.split("/")
    layers = stack.replace("|", "")
    return "/".join([layers[: max(layers.index(kind) for kind in set(layers)) + 1], *depths])


@dataclass
class Told:
    """An observer that writes down launches and waits."""

    launches: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    def launch(self, name: str, *ignored: object) -> None:
        self.launches.append(name)

    def wait(self, reason: str) -> None:
        self.waits.append(reason)

    def made(self, tensor: torch.Tensor) -> None: ...


def on_a_wrong_device() -> tuple[str, str]:
    """What torch and a Triton kernel say of operands on two devices."""
    from model.precision.backends.triton import Triton

    said = []
    with DEVICE.running(Told(), 1):
        there, here = torch.ones(3, 2, device="cuda"), torch.ones(3, 2)
        for call in (lambda: there + here, lambda: Triton.launch(lambda: None, there, (there, here, 3, 2), blocks=1, width=16)):
            try:
                call()
                said.append("")
            except RuntimeError as error:
                said.append(str(error))
    return said[0], said[1]


def waits_of_single_operations() -> list[list[str]]:
    found = []
    with DEVICE.running(Told(), 6):
        x = torch.ones(3, 2, device="cuda")
        host = torch.ones(3, 2)
    for call in (
        lambda: x.sum(),
        lambda: x.sum().item(),
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: host.pin_memory().to("cuda", non_blocking=True),
        lambda: x.cpu(),
        lambda: x.masked_select(x > 0),
        lambda: x[x > 0],
        lambda: torch.full((), 2.0, device="cuda"),
    ):
        told = Told()
        with DEVICE.running(told, 6):
            call()
        found.append(told.waits)
    return found


def refused_collectives() -> list[str]:
    """What a process group of a GPU says of tensors it cannot take."""
    said = []
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with DEVICE.running(Told(), 1):
            there = torch.ones(4, 2, device="cuda")
            for tensor in (there, there.short(), torch.ones(4, 2)):
                try:
                    dist.all_reduce(tensor)
                    said.append("")
                except RuntimeError as error:
                    said.append(str(error))
    finally:
        dist.destroy_process_group()
    return said


def a_product() -> tuple[float, int, float, int, int]:
    """FLOPs, bytes moved, seconds of one GEMM; memory at most and afterwards."""
    hardware = ClusterConfig("x", memory_bytes_per_second=1e9, peak_flops=PeakFlops(fp32=1e6, bf16=1e9))
    ledger = Ledger(hardware)
    with DEVICE.running(ledger, 1):
        a = torch.empty(64, 128, dtype=torch.bfloat16, device="cuda")
        b = torch.empty(128, 32, dtype=torch.bfloat16, device="cuda")
        product = a @ b
        del product
    account = ledger.accounts["rest"]
    return account.gemm_flops, account.moved, account.seconds, ledger.peak, ledger.living


def test_a_tensor_on_a_wrong_device_raises(elsewhere: ProcessPoolExecutor) -> None:
    added, launched = elsewhere.submit(on_a_wrong_device).result()
    assert "device" in added and "cpu" in added
    assert "works on cuda:0 and was given a tensor on cpu" in launched


def test_a_collective_that_nccl_lacks_raises(elsewhere: ProcessPoolExecutor) -> None:
    taken, unknown, on_the_host = elsewhere.submit(refused_collectives).result()
    assert taken == ""
    assert "torch.int16, which NCCL does not know" in unknown
    assert "a tensor on cpu, where NCCL is not" in on_the_host


def test_what_makes_the_host_wait(elsewhere: ProcessPoolExecutor) -> None:
    expected = [[], ["item"], ["copy from the host"], [], ["copy to the host"], ["masked_select"], ["index by a mask"], []]
    assert elsewhere.submit(waits_of_single_operations).result() == expected


def test_a_product_by_hand(elsewhere: ProcessPoolExecutor) -> None:
    flops, moved, seconds, peak, living = elsewhere.submit(a_product).result()
    inputs, output = 2 * (64 * 128 + 128 * 32), 2 * 64 * 32
    assert flops == 2 * 64 * 128 * 32
    assert moved == inputs + output
    assert seconds == pytest.approx(flops / 1e9)
    assert (peak, living) == (inputs + output, inputs)  # all multiples of 512


def test_flops_and_weights_of_a_step_are_those_of_the_accounts(elsewhere: ProcessPoolExecutor) -> None:
    """`model.count` knows nothing of what runs."""
    overrides = (*SMALL, "precision=bf16", "model.pattern=ME*E")
    found = elsewhere.submit(traced, "tiny", overrides, 1).result()
    model = load_recipe("tiny", *overrides).model
    assert found.total.gemm_flops == 3 * 128 * sum(use.flops for use in linear_modules(model))
    assert found.memory.weights == 2 * count(model).parameters
    assert found.memory.optimizer == 12 * count(model).parameters  # a master and two moments
    assert found.memory.peak > found.memory.weights + found.memory.gradients + found.memory.optimizer


def test_everything_at_once_in_nvfp4(elsewhere: ProcessPoolExecutor) -> None:
    """Packed documents, health, MTP and ranks; and computing again keeps less."""
    overrides = (*SMALL, "model.pattern=ME*/E", "parallel.tensor=2", "parallel.expert=4")
    plain, again = (elsewhere.submit(traced, "tiny", (*overrides, *more), 4).result() for more in ((), EVERYTHING))
    for kind in ("Mamba-2", "MoE", "head and loss"):
        assert again.accounts[kind].kept < plain.accounts[kind].kept / 2
    assert again.total.gemm_flops > plain.total.gemm_flops
    for found in (plain, again):
        assert_waits(found)
    assert plain.total.launches > 1000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("more", [(), EVERYTHING], ids=["plain", "everything"])
def test_every_precision_group(group: str, more: tuple[str, ...], elsewhere: ProcessPoolExecutor) -> None:
    found = elsewhere.submit(traced, "tiny", (*SMALL, f"precision={group}", *more), 1).result()
    assert_waits(found)
    assert found.total.launches > 1000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("more", [(), EVERYTHING], ids=["plain", "everything"])
def test_every_recipe(name: str, more: tuple[str, ...], elsewhere: ProcessPoolExecutor) -> None:
    """On the ranks its layout is for; with fewer layers of each kind."""
    found = elsewhere.submit(traced, name, (f"model.pattern={few(load_recipe(name, world_size=None).model.pattern)}", *more), None).result()
    assert_waits(found)
    assert found.memory.peak > found.memory.weights > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_super_on_64_gpus_of_80_gb(elsewhere: ProcessPoolExecutor) -> None:
    found = elsewhere.submit(traced, "nemotron3_super", (), 64).result()
    assert_waits(found)
    assert [found.accounts[kind].calls for kind in ("Mamba-2", "MoE", "attention", "MTP block")] == [40, 40, 8, 2]
    assert found.memory.peak < 76 * 2**30


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pipeline(elsewhere: ProcessPoolExecutor) -> None:
    for more in ((), ("parallel.virtual_pipeline=2",)):
        found = elsewhere.submit(traced, "tiny", (*SMALL, "parallel.pipeline=2", *more), 2).result()
        assert_waits(found)
        assert found.microbatches == 2
