"""Small tensors from the host to a device, without the host waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """host, on a device. From pinned memory a copy is ordered with the kernels; from other memory the host waits until it is made."""
    return host.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else host.to(device)


def integers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 [len(numbers)]."""
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)
