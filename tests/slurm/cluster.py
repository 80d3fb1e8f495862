"""A real Slurm of two nodes on this machine, in a directory of its own: munged, slurmctld and two slurmd, with ports and a key of their own.

It needs root (slurmd starts jobs of any user) and Debian's slurm-wlm and munge, or what corresponds to them. Processes are ended by their ids.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "salloc")
SYSTEM = "/usr/sbin:/sbin:/usr/bin:/bin"
NODES = ("n0", "n1")


def missing() -> str | None:
    """Why there can be no Slurm here, in one sentence; None: there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SYSTEM}") is None]
    if lacking:
        return f"Slurm is not installed ({', '.join(lacking)} not found): apt-get install slurm-wlm munge, or make test-slurm as root"
    return None if os.geteuid() == 0 else "a Slurm of one's own has to be started by root: run make test-slurm as root, or in a container"


class Cluster:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.conf = directory / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:{SYSTEM}"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Until both nodes are up."""
        private = self.directory / "munge"
        for directory in (private, self.directory / "state", *(self.directory / f"spool-{node}" for node in NODES)):
            directory.mkdir(mode=0o700)
        key = private / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = [_free_port() for _ in range(3)]
        self.conf.write_text(_configuration(self.directory, ports))
        files = [f"--{name}-file={private / name}" for name in ("pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={private / 'socket'}", *files)
        self.wait(lambda: (private / "socket").exists(), 10, "munged did not start")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Until it is up, also again after `kill_node`."""
        self._start(node, "-D", "-N", node, program="slurmd")
        up = ("idle", "mixed", "allocated", "completing")  # but neither down nor unreachable (`idle*`)
        self.wait(lambda: self.ask("sinfo", "-h", "-n", node, "-o", "%T").strip() in up, 120, f"{node} did not come up")

    def kill_node(self, node: str) -> None:
        """As when its power fails: slurmd, the shepherds of its steps and all they started get SIGKILL at once."""
        tasks = self.tasks(node)
        shepherds = {parent for task in tasks if (parent := _parent(task)) is not None and "slurmstepd" in " ".join(parent.cmdline())}
        self.processes[node].kill()
        for process in {*shepherds, *tasks}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.processes.pop(node).wait()

    def tasks(self, node: str, module: str = "") -> list[psutil.Process]:
        """Processes of jobs on a node; module: only those of `python -m MODULE`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment, wanted = process.environ(), not module or ["-m", module] == process.cmdline()[1:3]
                ours = environment.get("SLURM_CONF") == str(self.conf) and environment.get("SLURMD_NODENAME") == node
                if wanted and ours and "SLURM_STEP_ID" in environment:
                    found.append(process)
        return found

    def stop(self) -> None:
        with contextlib.suppress(AssertionError):
            self.ask("scancel", "--user=root", check=False)
            self.wait(lambda: not self.ask("squeue", "-h").strip(), 60, "jobs do not end")
        for node in NODES:
            for process in self.tasks(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        for process in reversed(self.processes.values()):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                process.kill()
                process.wait()

    def ask(
        self, *line: str, check: bool = True, timeout: float = 120, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """What a command prints."""
        done = subprocess.run(
            line, env={**self.environment, **(environment or {})}, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{' '.join(line)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        line = self.ask("scontrol", "show", "job", "-o", job)
        return dict(word.partition("=")[::2] for word in line.split() if "=" in word)

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, f"{what} within {seconds:g} s\n{self._tails()}"
            time.sleep(0.2)

    def start_soon(self, job: str, restarts: int) -> None:
        """Once it has been requeued so often: Slurm waits two minutes before such a job may start, and a test does not wait so long. Not at once,
        either: a credential as old as the second in which the nodes gave the job up is refused."""
        self.wait(lambda: self.state(job)["Restarts"] == str(restarts), 600, f"job {job} is not put back into the queue")
        self.wait(lambda: self.state(job)["JobState"] in ("PENDING", "RUNNING"), 600, f"job {job} does not end before it starts again")
        self.ask(
            "scontrol", "update", f"jobid={job}", "StartTime=now+10seconds", check=False
        )  # of one that runs already it cannot be changed

    def _start(self, name: str, *arguments: str, program: str | None = None) -> None:
        path = shutil.which(program or name, path=self.environment["PATH"])
        assert path is not None
        with (self.directory / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [path, *arguments], env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def _tails(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-600:]}" for path in sorted(self.directory.glob("*.out")))


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Cluster]:
    cluster = Cluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def stopped(process: psutil.Process) -> Callable[[], None]:
    """Stops a process; the result lets it go on."""
    process.send_signal(signal.SIGSTOP)

    def go_on() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)

    return go_on


def _parent(process: psutil.Process) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        return process.parent()
    return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _configuration(directory: Path, ports: list[int]) -> str:
    host = socket.gethostname()
    return f"""\
ClusterName=nibble
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=600
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
