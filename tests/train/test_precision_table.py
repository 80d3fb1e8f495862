"""The table of modules x GEMM x format and its shares."""

from __future__ import annotations

import pytest

from tests.train.recipes import recipe
from train.precision_table import LinearRow, OtherRow, precision_table, precision_tables, table_at

NVFP4 = ("nvfp4", "nvfp4", "nvfp4")
BF16 = ("bf16", "bf16", "bf16")


def test_shares_count_every_gemm_once() -> None:
    table = precision_table([LinearRow("layers.0.mixer.in_proj", 300.0, ("nvfp4", "nvfp4", "bf16")),
                             LinearRow("lm_head", 100.0, BF16)])  # fmt: skip
    # 1200 FLOPs in six GEMMs: nvfp4 600, bf16 300 + 300
    assert table.shares == {"nvfp4": 0.5, "bf16": 0.5}
    assert table.metrics() == {"precision/share/nvfp4": 0.5, "precision/share/bf16": 0.5}


def test_other_work_is_listed_apart_and_counts_in_no_share() -> None:
    rows = [LinearRow("lm_head", 100.0, BF16)]
    table = precision_table(rows, [OtherRow("attention", "layers.0.mixer", 900.0, "fp32"),
                                   OtherRow("SSD", "layers.1.mixer", 1500.0, "fp32"),
                                   OtherRow("SSD", "layers.2.mixer", 1500.0, "fp32")])  # fmt: skip
    assert table.shares == {"bf16": 1.0}
    assert table.text.splitlines()[-1].strip() == ("Apart from these, forward: attention in fp32 900/token, SSD in fp32 3k/token")


def test_rows_of_the_same_kind_and_formats_are_merged() -> None:
    rows = [LinearRow(f"layers.{index}.mixer.out_proj", 1e6, NVFP4 if index < 6 else BF16) for index in (0, 2, 3, 4, 6, 8)]
    rows.append(LinearRow("mtp.layers.0.layers.1.mixer.out_proj", 1e6, BF16))
    rows += [LinearRow(f"layers.{index}.mixer.gate", 1e3, BF16) for index in range(1, 40, 2)]
    lines = precision_table(rows).text.splitlines()
    cells = [line.split() for line in lines[2:6]]
    assert cells[0] == ["layers.{0,2-4}.mixer.out_proj", "4", *NVFP4, "4M", "57.0%"]
    assert cells[1] == ["layers.{6,8}.mixer.out_proj", "2", *BF16, "2M", "28.5%"]
    assert cells[2] == ["mtp.layers.0.layers.1.mixer.out_proj", "1", *BF16, "1M", "14.2%"]
    assert cells[3] == ["layers.{1,3,5,...,39}.mixer.gate", "20", *BF16, "20k", "0.3%"]
    assert len({len(line) for line in lines[:6]}) == 1  # the columns are aligned


def test_variants_of_a_format_are_told_apart_and_share_its_name() -> None:
    rule = '{format: nvfp4, modules: ["layers.2.*"], gemms: [fprop], nvfp4: {clipping: 4over6_mae, e4m3_bound: 256}}'
    router = '{format: bf16, modules: ["*.gate"]}'
    late = "{format: bf16, start: decay}"
    tables = precision_tables(recipe(f"precision.rules=[{rule},{router}]", f"precision.schedule=[{late}]"))
    early, decay = table_at(tables, 0.3), table_at(tables, 0.9)
    assert early is tables[0.0] and early is not decay
    assert early.shares.keys() == {"nvfp4", "bf16"} and decay.shares == {"bf16": 1.0, "nvfp4": 0.0}
    line = next(line for line in early.text.splitlines() if "layers.2.mixer.in_proj" in line).split()
    assert " ".join(line[2:6]) == "nvfp4(clipping=4over6_mae, e4m3_bound=256) nvfp4 nvfp4"


def test_wrong_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        precision_table([])
    with pytest.raises(ValueError, match=r"lm_head has 0\.0 FLOPs per token"):
        precision_table([LinearRow("lm_head", 0.0, BF16)])
