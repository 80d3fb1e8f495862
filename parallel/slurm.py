"""What Slurm is told about a run: the recipe's `cluster.slurm` group, which a cluster's profile fills in. `launch/slurm.py` writes the script."""

import re
from dataclasses import dataclass
from typing import Literal

TIME = r"(\d+-)?\d+(:\d\d){0,2}"


@dataclass(frozen=True)
class SlurmConfig:
    """The recipe's `cluster.slurm` group."""

    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that pays; null: the user's default."""
    qos: str | None = None
    """Quality of service; null: the user's default."""
    time: str | None = None
    """Time limit of one job, in quotes: minutes, hours:minutes:seconds or days-hours; null: the partition's. A run may take many jobs."""
    cpus_per_rank: int | None = None
    """CPU cores of a rank; null: as the cluster gives them."""
    memory: str | None = None
    """Memory of a node as Slurm writes it, such as 512G or 0 (all); null: the cluster's default."""
    gpus: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How devices are asked for: --gpus-per-node=N, --gres=gpu:N, or not at all, where nodes are given whole. Without meaning on CPUs."""
    exclusive: bool = False
    """Whether nodes are shared with nobody."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, one an entry, as in ["--constraint=h100"]."""
    srun: tuple[str, ...] = ()
    """Further options of srun."""
    signal_seconds: int = 120
    """Seconds before the time limit at which ranks are asked to save and end: more than a step and a checkpoint take."""
    requeue: bool = True
    """Whether a job that ran out of time, or lost a node, goes back into the queue; false, where a cluster forbids it: see chain."""
    chain: int = 1
    """Jobs of a run that are submitted at once and run one after the other, each going on where the last ended; more than 1 needs requeue=false."""
    retries: int = 3
    """Starts after failures within an hour each that one job makes by itself before it gives up."""
    jobs_at_once: int | None = None
    """Jobs of a sweep that may run at the same time; null: as many as the cluster lets."""
    modules: tuple[str, ...] = ()
    """Environment modules that are loaded first."""
    setup: tuple[str, ...] = ()
    """Lines of shell that are run on the first node before the ranks start; the only key whose text is executed."""
    python: str | None = None
    """The Python of the ranks; null: the one that submits or, in a container, python."""
    container: Literal["pyxis", "apptainer"] | None = None
    """What ranks run in: pyxis (enroot's plugin for srun), apptainer, or null, for nothing."""
    image: str | None = None
    """Of the container."""
    mounts: tuple[str, ...] = ()
    """Further paths that the container sees, each as PATH or FROM:TO; the directory of submission and the run's are always among them."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for what cannot be written into a script."""
        if self.time is not None and not re.fullmatch(TIME, self.time):
            raise ValueError(f"cluster.slurm.time={self.time!r} is no time limit: write minutes, hours:minutes:seconds or days-hours")
        for key, least in (("signal_seconds", 1), ("chain", 1), ("retries", 0), ("cpus_per_rank", 1), ("jobs_at_once", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"cluster.slurm.{key}={value} must be at least {least}")
        if self.signal_seconds > 65535:
            raise ValueError(f"cluster.slurm.signal_seconds={self.signal_seconds} is more than Slurm's 65535 seconds: use for instance 120")
        if self.chain > 1 and self.requeue:
            raise ValueError(f"cluster.slurm.chain={self.chain} takes the place of requeueing: set cluster.slurm.requeue=false, or chain=1")
        if (self.container is None) != (self.image is None):
            raise ValueError(
                f"cluster.slurm.container={self.container} and cluster.slurm.image={self.image} go together: give both, or neither"
            )
        for key in ("extra", "srun"):
            for option in getattr(self, key):
                if not re.match(r"--?\w", option):
                    raise ValueError(f"cluster.slurm.{key}=[{option!r}] is no option: write it as --name=value")
        for mount in self.mounts:
            if "," in mount or mount.count(":") > 1:
                raise ValueError(f"cluster.slurm.mounts=[{mount!r}] is no mount: write PATH or FROM:TO, one an entry")
        texts = [("setup", line) for line in self.setup]
        texts += [(key, text) for key in ("extra", "srun", "modules", "mounts") for text in getattr(self, key)]
        texts += [(key, getattr(self, key)) for key in ("partition", "account", "qos", "memory", "python", "image")]
        for key, text in texts:
            if text is not None and (not text.isprintable() or not text.strip()):
                raise ValueError(f"cluster.slurm.{key}={text!r} is empty or holds a control character: write one plain line")
