"""Questions that all ranks answer and rank 0 judges, with a limited time for each: who does not come, or hangs, is named, not waited for."""

import contextlib
import datetime
import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist


class Unfit(Exception):
    """Ends a preflight, on every rank; the arguments are sentences, which rank 0 says."""


class Desk:
    """store: through which ranks talk, on rank 0; None: there is one rank. patience: seconds for an answer. ranks_here: of a node. slurm: the
    environment, by which a rank that never came is still placed on a node."""

    def __init__(
        self, store: dist.Store | None, rank: int, world_size: int, patience: float, ranks_here: int, slurm: Mapping[str, str]
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.patience, self.ranks_here, self.slurm = patience, ranks_here, slurm
        self.nodes: dict[int, str] = {}

    def ask(
        self, question: str, answer: Any, judge: Callable[[list[Any]], Sequence[str]] = lambda answers: (), longer: float = 0.0
    ) -> list[Any]:
        """The answers of all ranks, on each of them. judge: called on rank 0, for what is wrong with them. longer: seconds that answering takes.

        Raises Unfit on every rank where there is something wrong.
        """
        if self.store is None:
            answers, sentences = [answer], list(judge([answer]))
        elif self.rank == 0:
            answers, sentences = self._collect(question, answer, longer)
            sentences = sentences or list(judge(answers))
            self.store.set(f"{question}/all", json.dumps([answers, sentences]))
        else:
            self.store.set(f"{question}/{self.rank}", json.dumps(answer))
            try:
                self.store.wait([f"{question}/all"], datetime.timedelta(seconds=2 * self.patience + longer))
                answers, sentences = json.loads(self.store.get(f"{question}/all"))
            except (dist.DistStoreError, dist.DistNetworkError):
                raise Unfit() from None  # rank 0 is gone
        if sentences:
            raise Unfit(*sentences)
        return answers

    def leave(self) -> None:
        """Once a sentence was found, or none: the store lives on rank 0, which goes last."""
        if self.store is None:
            return
        with contextlib.suppress(dist.DistStoreError, dist.DistNetworkError):
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self.store.wait([f"left/{rank}" for rank in range(self.world_size)], datetime.timedelta(seconds=5))

    def _collect(self, question: str, answer: Any, longer: float) -> tuple[list[Any], list[str]]:
        assert self.store is not None
        seconds = self.patience + longer
        end, answers, silent = time.monotonic() + seconds, [answer], []
        for rank in range(1, self.world_size):
            try:
                self.store.wait([f"{question}/{rank}"], datetime.timedelta(seconds=max(0.1, end - time.monotonic())))
                answers.append(json.loads(self.store.get(f"{question}/{rank}")))
            except dist.DistStoreError:
                answers.append(None)
                silent.append(rank)
        if question == "come":
            self.nodes = {rank: node for rank, node in enumerate(answers) if node}
        return answers, [f"node {self.node_of(rank)} (rank {rank}) gave no answer ({question}) within {seconds:g} s" for rank in silent]

    def node_of(self, rank: int) -> str:
        """Where it said it is or, of one that never came, where its neighbours are, or where Slurm has put it."""
        number = rank // self.ranks_here
        neighbours = (self.nodes.get(one) for one in range(number * self.ranks_here, (number + 1) * self.ranks_here))
        return self.nodes.get(rank) or next(filter(None, neighbours), None) or self._by_slurm(number)

    def _by_slurm(self, number: int) -> str:
        nodes = self.slurm.get("SLURM_STEP_NODELIST", "")
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=30)
            return listed.stdout.split()[number]
        return f"number {number + 1} of {nodes or 'the job'}"
