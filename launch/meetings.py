"""All-reduce between pairs of nodes, as a tournament: in each round every node meets one other, all at the same time.

Every rank of a node reduces with the rank in its place on the other node, so each has its own way out of the machine measured. Two ranks reduce by
sending each other all they have, which is what an all-reduce of two does with its halves, twice.
"""

import datetime
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from launch.judge import rounds
from parallel.preflight import PreflightConfig

WARM = 1024  # bytes of the first exchange of a pair, which opens the connection


def hold(store: dist.Store, nodes: Sequence[str], rank: int, device: torch.device, config: PreflightConfig) -> list[tuple[int, int, float]]:
    """What this rank met: (index of a node, of the other, bytes/s), once for each pair; nodes in the order of their first ranks.

    nodes: of each rank. Raises dist.DistError, or a RuntimeError of gloo's, where a connection breaks.
    """
    order = list(dict.fromkeys(nodes))
    ranks = [[number for number, node in enumerate(nodes) if node == name] for name in order]
    own, place = order.index(nodes[rank]), ranks[order.index(nodes[rank])].index(rank)
    timeout = datetime.timedelta(seconds=config.patience_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("meetings", store), rank=rank, world_size=len(nodes), timeout=timeout)
    sent = torch.ones(max(1, config.bandwidth_bytes // 4), device=device)
    received = torch.empty_like(sent)
    found: list[tuple[int, int, float]] = []
    begin = time.monotonic()
    for pairs in rounds(len(order)):
        if not _goes_on(begin, config.bandwidth_seconds, device):
            break
        pair = next((pair for pair in pairs if own in pair), None)
        if pair is None:
            continue
        others = ranks[pair[0] if own == pair[1] else pair[1]]
        if place < len(others):
            _exchange(sent[: WARM // 4], received[: WARM // 4], others[place])
            seconds = _exchange(sent, received, others[place])
            found.append((*pair, sent.numel() * 4 / seconds))
    dist.destroy_process_group()
    return found


def _goes_on(begin: float, seconds: float, device: torch.device) -> bool:
    """Whether there is time for another round, as rank 0 sees it; ranks begin a round together."""
    answer = torch.tensor([time.monotonic() - begin < seconds], dtype=torch.int32, device=device)
    dist.broadcast(answer, 0)
    return bool(answer.item())


def _exchange(sent: torch.Tensor, received: torch.Tensor, other: int) -> float:
    """Seconds of an all-reduce of two."""
    begin = time.perf_counter()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]):
        work.wait()
    received.add_(sent)
    if sent.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin
