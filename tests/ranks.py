"""The rank pool: worker processes started once a session, in which tests run a function on several gloo ranks."""

import contextlib
import datetime
import importlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT = 120.0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _worker(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from parallel import groups

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        module, name, rank, world, port, arguments = job
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
            function = getattr(importlib.import_module(module), name)
            answer: tuple[bool, Any] = (True, function(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        with contextlib.suppress(Exception):
            groups.shutdown()
        pipe.send(answer)


class RankPool:
    """`pool.run(n, function, *args)` calls `function(rank, *args)` on n ranks of one process group and returns their results.

    The function must be importable (defined at the top of a test module). Workers are started when first needed and reused; after a timeout
    they are killed and started afresh.
    """

    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection]] = []

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            while len(self.workers) < count:
                ours, theirs = context.Pipe()
                process = context.Process(target=_worker, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self.workers.append((process, ours))
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before

    def stop(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers.clear()

    def run(self, world: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
        self._start(world)
        port = _free_port()
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:world])}
        for pipe, rank in pipes.items():
            pipe.send((function.__module__, function.__qualname__, rank, world, port, arguments))
        results: dict[int, Any] = {}
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
        while len(results) < world:
            left = (deadline - datetime.datetime.now()).total_seconds()
            ready = wait([pipe for pipe, rank in pipes.items() if rank not in results], timeout=max(left, 0))
            if not ready:
                self.stop()
                missing = sorted(set(range(world)) - set(results))
                raise TimeoutError(f"ranks {missing} of {world} gave no answer within {timeout:g} s")
            for pipe in [pipe for pipe in pipes if pipe in ready]:
                try:
                    good, value = pipe.recv()
                except EOFError:
                    self.stop()
                    raise RuntimeError(f"rank {pipes[pipe]} of {world} died") from None
                if not good:
                    # The others may hang in a collective with the rank that failed.
                    self.stop()
                    raise RuntimeError(f"rank {pipes[pipe]} of {world} failed:\n{value}")
                results[pipes[pipe]] = value
        return [results[rank] for rank in range(world)]
