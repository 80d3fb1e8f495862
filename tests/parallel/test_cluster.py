"""Hardware profiles: which one a device gets, and at which peak a format counts."""

import shutil
from pathlib import Path

import pytest

from parallel.cluster import ClusterConfig, PeakFlops, matching
from train.recipe import clusters, load
from train.recipe.clusters import profiles
from train.recipe.load import load_recipe
from train.recipe.reading import RecipeError


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"), ("NVIDIA GB200", "gb200"),
        ("NVIDIA H100 PCIe", None), ("NVIDIA GH200 480GB", None), ("NVIDIA A100-SXM4-80GB", None),
    ],
)  # fmt: skip
def test_a_gpu_finds_its_own_profile_and_no_other(device: str, name: str | None) -> None:
    found = matching(device, profiles())
    assert (found and found.name) == name


def test_every_profile_can_be_chosen_and_holds_together() -> None:
    known = {profile.name: profile for profile in profiles()}
    assert set(known) >= {"h100", "h200", "b200", "gb200", "cpu"}
    for name, profile in known.items():
        recipe = load_recipe("tiny", f"cluster={name}", "cluster.nodes=8")
        assert recipe.cluster.name == name and recipe.cluster.nodes == 8
        if name != "cpu":
            peaks = [profile.peak(form) for form in ("fp32", "bf16", "mxfp8", "nvfp4")]
            assert all(peaks) and peaks == sorted(peaks)  # type: ignore[type-var]
    assert known["b200"].peak("nvfp4") == 4 * known["b200"].peak("bf16")  # type: ignore[operator]


def test_a_cluster_of_ones_own_over_a_shipped_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/launching.md shows it: for Hydra and for finding a profile by its device."""
    page = (Path(__file__).resolve().parents[2] / "docs/launching.md").read_text()
    shutil.copytree(clusters.RECIPES, tmp_path / "recipes")
    (tmp_path / "recipes/cluster/ours.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    for module in (load, clusters):
        monkeypatch.setattr(module, "RECIPES", tmp_path / "recipes")
    found = load_recipe("tiny", "cluster=ours", "cluster.nodes=2", "train.global_batch_size=16", world_size=16).cluster
    assert (found.name, found.devices_per_node, found.ranks, found.slurm.partition, found.slurm.time) == (
        "ours",
        8,
        16,
        "batch",
        "04:00:00",
    )
    assert found.peak("bf16") == 989e12
    assert {profile.name: profile.device for profile in profiles()}["ours"] == found.device


def test_a_format_without_units_counts_as_what_it_is_multiplied_in() -> None:
    hopper = ClusterConfig(peak_flops=PeakFlops(fp32=1.0, bf16=15.0))
    assert [hopper.peak(name) for name in ("fp32", "bf16", "mxfp8", "nvfp4", "registered_elsewhere")] == [1.0, 15.0, 15.0, 15.0, 15.0]
    measured = ClusterConfig(peak_flops=PeakFlops(fp32=2.0))
    assert measured.peak("nvfp4") == measured.peak("fp32") == 2.0
    assert ClusterConfig().peak("bf16") is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [("cluster.nodes=0", r"cluster\.nodes=0 must be positive"), ("cluster.peak_flops.bf16=-1", r"cluster\.peak_flops\.bf16=-1\.0 must be"),
     ("cluster.node=2", None)],
)  # fmt: skip
def test_wrong_numbers_are_refused(override: str, sentence: str | None) -> None:
    with pytest.raises(RecipeError if sentence else Exception, match=sentence):
        load_recipe("tiny", override)
