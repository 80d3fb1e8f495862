"""A second oracle nobody here wrote: fouroversix 1.0.5, whose PyTorch backend runs on a CPU.

Its package asks for CUDA to be installed: unpack the source distribution and put its `src` folder, and a `fouroversix-1.0.5.dist-info`
with its PKG-INFO as METADATA, on PYTHONPATH. fp32 operands: of bf16 ones it rounds intermediate numbers of static_6 to bf16.
"""

from typing import Any

import pytest
import torch

from model.precision.nvfp4 import quantize

fouroversix: Any = pytest.importorskip("fouroversix", reason="fouroversix is not on PYTHONPATH")


@pytest.mark.parametrize("tiles", [False, True], ids=["1d", "2d"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("static_6", {}),
        ("mse", {"clipping": "4over6_mse", "e4m3_bound": 256}),
        ("mae", {"clipping": "4over6_mae", "e4m3_bound": 256}),
    ],
    ids=["static_6", "mse", "mae"],
)
def test_codes_and_scales_are_equal(rule: str, options: dict[str, Any], tiles: bool) -> None:
    for seed, scale in enumerate((1.0, 1e-6, 300.0)):
        x = torch.randn(256, 512, generator=torch.Generator().manual_seed(seed)) * scale
        theirs = fouroversix.quantize_to_fp4(x, fouroversix.QuantizationConfig(backend="pytorch", scale_rule=rule, block_scale_2d=tiles))
        ours = quantize(x, scaling="2d" if tiles else "1d", **options)
        assert torch.equal(theirs.values.view(torch.uint8).reshape(ours.codes.shape), ours.codes)
        # Its scales lie in the order tensor cores read them.
        assert torch.equal(theirs.scale_factors.view(torch.uint8).flatten().sort().values, ours.scales.flatten().sort().values)
        assert theirs.amax == ours.amax
