"""What Transformer Engine's reference quantizer gave, recorded in the folder `records` beside this file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIRECTORY = Path(__file__).resolve().parent / "records"


class Vectors:
    """Records of Transformer Engine's own outputs."""

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self.records: dict[str, dict[str, Any]] = json.loads((directory / "nvfp4_reference_vectors.json").read_text())
        self.arrays = np.load(directory / "nvfp4_reference_vectors.npz")
        self.quantized = [name for name in self.records if not name.startswith("_")]

    def field(self, record: str, name: str) -> Tensor:
        tensor = torch.from_numpy(self.arrays[f"{record}/{name}"])
        return tensor.view(torch.bfloat16) if self.records[record].get(name) == "bf16bits" else tensor

    def options(self, record: str, *, transposed: bool) -> dict[str, Any]:
        """The reference's arguments in our names."""
        info = self.records[record]
        given = info["kwargs"]
        result: dict[str, Any] = {}
        if info["kind"] == "2d":
            result["scaling"] = "2d"
        if info["kind"] == "rht" and transposed:  # only the transposed operand is rotated
            result |= {"hadamard": True, "hadamard_signs": given.get("with_random_sign_mask", True)}
        if given.get("row_scaled_nvfp4"):
            result["row_scaled"] = True
        if given.get("nvfp4_use_4over6"):
            result |= {"clipping": f"4over6_{given['nvfp4_4over6_err_mode'].lower()}", "e4m3_bound": int(given["nvfp4_e4m3_max"])}
        return result
