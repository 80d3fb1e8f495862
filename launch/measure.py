"""What a preflight measures on one rank."""

import hashlib
import os
import platform
import shutil
import socket
import statistics
import time
from pathlib import Path

import megatron.core
import numpy
import psutil
import torch

from data.config import DataConfig
from data.documents import DataError, files_of
from data.generated import is_generated
from data.indexed import prefix_of
from train.recipe.load import RECIPES

ROOT = RECIPES.parent
ROOMS = ("train", "model", "parallel", "data", "launch", "recipes")
MOST_FILES = 1000  # of a source that are opened, evenly spread over it
SIDES = {"cpu": 512, "cuda": 8192}  # of the square matrices that are multiplied


def node() -> str:
    """What Slurm calls this machine, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def versions() -> dict[str, str]:
    """Of what must be the same on all nodes."""
    found = {
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "megatron-core": str(megatron.core.__version__),
        "numpy": str(numpy.__version__),
        "code": code_hash(),
    }
    if torch.cuda.is_available():
        found |= {
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "device": torch.cuda.get_device_name(),
        }
    return found


def code_hash() -> str:
    """Of every source file and recipe of this program."""
    sha = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".yaml") and path.is_file():
                sha.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()[:12]


def matrix_flops(device: torch.device, seconds: float) -> float:
    """FLOP/s of a matrix product, in bf16 on a GPU and in fp32 on a CPU: the median over as many as fit into `seconds`."""
    side = SIDES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    end = time.perf_counter() + seconds
    timed_product(a, b)
    while time.perf_counter() < end or len(times) < 3:
        times.append(timed_product(a, b))
    return 2 * side**3 / statistics.median(times)


def timed_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds."""
    begin = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def free_device_memory(device: torch.device) -> float | None:
    """As a share; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free / total


def free_host_memory() -> int:
    """Bytes."""
    return int(psutil.virtual_memory().available)


def disk(directory: Path, size: int) -> tuple[float, int]:
    """Bytes/s at which `size` bytes reach the disk below `directory`, and bytes free there. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".preflight-{node()}-{os.getpid()}"
    chunk = os.urandom(1 << 20)
    try:
        begin = time.perf_counter()
        with path.open("wb") as file:
            for offset in range(0, size, len(chunk)):
                file.write(chunk[: size - offset])
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begin
    finally:
        path.unlink(missing_ok=True)
    return size / seconds, shutil.disk_usage(directory).free


def unreadable(config: DataConfig) -> str:
    """Why some file of the recipe's data cannot be read from here; empty: all can."""
    for phase in config.phases:
        for source in phase.blend:
            if is_generated(source.path):
                continue
            try:
                prefix = prefix_of(source.path)
                files = files_of(source.path) if prefix is None else [prefix.with_name(prefix.name + end) for end in (".bin", ".idx")]
                for path in files[:: max(1, len(files) // MOST_FILES)]:
                    with path.open("rb") as file:
                        file.read(1)
            except (DataError, OSError) as error:
                return str(error)
    if config.tokenizer.kind == "file":
        try:
            with open(str(config.tokenizer.path), "rb") as file:
                file.read(1)
        except OSError as error:
            return str(error)
    return ""
