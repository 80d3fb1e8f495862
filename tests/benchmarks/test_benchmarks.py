"""The benchmarks run, at sizes that measure nothing, and refuse wrong arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import activations, gpu, linear, long_context, quantize, speculative, step, token
from benchmarks.arguments import main


def test_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "quantize.json"
    assert main(quantize.run, quantize.DEFAULTS, ["size=64", "rounds=1", f"to={to}"]) == 0
    values: dict[str, Any] = json.loads(to.read_text())["operands"]["64 x 64"]
    assert {"ours/1D", "ours/2D", "ours/RHT+SR", "reference/RHT+SR", "floor"} <= values["seconds"].keys()
    assert "ours / floor" in capsys.readouterr().out


def test_linear(tmp_path: Path) -> None:
    to = tmp_path / "linear.json"
    assert main(linear.run, linear.DEFAULTS, ["sizes=[64]", "rounds=1", f"to={to}"]) == 0
    values = json.loads(to.read_text())["sizes"]["64"]
    assert values["kept_bits"] == 4.5 + 32 / 64**2 and values["ratio"] > 0  # a code, a sixteenth of a scale, and one amax


@pytest.mark.slow
def test_the_next_token_of_mamba_layers_costs_as_much_however_long_the_text() -> None:
    lengths = [64, 16384]
    seconds, sizes = token.by_length("MEMEME", lengths, rounds=30)
    assert sizes[64] == sizes[16384] and seconds[16384] < 1.15 * seconds[64]
    seconds, sizes = token.by_length("*E*E*E", lengths, rounds=30)
    assert sizes[16384] == 256 * sizes[64] and seconds[16384] > 1.5 * seconds[64]  # what the bound above would find


@pytest.mark.slow
def test_speculative(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to, picture = tmp_path / "drafts.json", tmp_path / "drafts.png"
    arguments = ["models=[tiny]", "depths=2", "tokens=12", "rounds=1", f"to={to}", f"picture={picture}"]
    assert main(speculative.run, speculative.DEFAULTS, arguments) == 0
    (found,) = json.loads(to.read_text())["models"]
    for each in found["depths"]:
        assert each["round"] == pytest.approx(each["length"] / each["speed"]) and 1 <= each["length"] <= 1 + each["depth"]
    assert speculative.needed(1.75, 2) == pytest.approx(0.5)  # 1 + 1/2 + 1/4
    assert "untrained: costs alone" in capsys.readouterr().out and picture.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_long_context(tmp_path: Path) -> None:
    to, picture = tmp_path / "long.json", tmp_path / "long.png"
    arguments = ["lengths=[64,256]", "rounds=1", "ranks=[1,2]", "tokens=1024", f"to={to}", f"picture={picture}"]
    assert main(long_context.run, long_context.DEFAULTS, arguments) == 0
    values = json.loads(to.read_text())
    assert values["bytes"]["256"] == pytest.approx(values["bytes"]["64"], rel=0.02)
    assert values["peak_bytes"]["1"] > 1.4 * values["peak_bytes"]["2"]
    assert picture.stat().st_size > 10_000


def test_activations(tmp_path: Path) -> None:
    to = tmp_path / "activations.json"
    assert main(activations.run, activations.DEFAULTS, ["recipe=tiny", "precision=bf16", "tokens=64", f"to={to}"]) == 0
    values = json.loads(to.read_text())["bytes_per_token"]
    assert values["MoE"]["moe"] < values["MoE"]["nothing"]


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (quantize, ["size=60"], ["size=60", "16"]),
        (quantize, ["shapes=round"], ["shapes=round", "layers"]),
        (linear, ["sizes=[64,0]"], ["sizes=[64, 0]", "[1024, 2048]"]),
        (linear, ["rounds=soon"], ["rounds=soon", "whole number"]),
        (long_context, ["ranks=[1,3]"], ["tokens=8192", "ranks=3"]),
        (long_context, ["way=ring"], ["way=ring", "state or all_to_all"]),
        (activations, ["recipe=tinny"], ["recipe=tinny", "tiny"]),
        (gpu, ["stages=[fly]"], ["stages=['fly']", "repeat"]),
        pytest.param(
            gpu, [], ["CUDA device", "none of bf16", "has run"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")
        ),
        (step, ["recepi=tiny"], ["recepi", "recipe"]),
        (step, ["recipe=tinny"], ["recipe=tinny", "tiny"]),
        (step, ["contenders=[fp32,fp5]"], ["fp5", "measured"]),
    ],
)
def test_wrong_arguments_are_one_sentence(module: Any, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(module.run, module.DEFAULTS, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error
