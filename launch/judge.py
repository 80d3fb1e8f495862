"""What a preflight's measurements say about the nodes: pure functions from reports to sentences, one for each node or pair that is unfit."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from parallel.preflight import PreflightConfig


@dataclass(frozen=True)
class Report:
    """What one rank found. versions: of programs and of the code; memory: free share of its device, None on a CPU; host_memory: free bytes;
    flops: of its matrix product, FLOP/s. Of the first rank of a node only: clock: seconds ahead of the first node's, and how far that may be
    wrong; disk: bytes/s written and bytes free; unreadable: why the data cannot be read. error: a question it could not answer."""

    rank: int
    node: str
    devices: int = 0
    ranks_here: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    memory: float | None = None
    host_memory: int | None = None
    flops: float | None = None
    clock: tuple[float, float] | None = None
    disk: tuple[float, int] | None = None
    unreadable: str = ""
    error: str = ""


@dataclass(frozen=True)
class Meeting:
    """An all-reduce between two nodes, over the slowest of their pairs of ranks."""

    nodes: tuple[str, str]
    bytes_per_second: float


def findings(reports: Sequence[Report], config: PreflightConfig) -> list[str]:
    """A sentence for each node that is unfit, and why."""
    found: list[str] = []
    for report in reports:
        if report.error:
            found.append(f"{_who(report)} could not be examined: {report.error}")
    for report in reports:
        found += _own(report, config)
    return list(dict.fromkeys([*found, *_versions(reports), *_speeds(reports, config)]))


def _who(report: Report) -> str:
    return f"node {report.node} (rank {report.rank})"


def _own(report: Report, config: PreflightConfig) -> list[str]:
    """What a node shows without others beside it."""
    found = []
    if report.devices and report.devices < report.ranks_here:
        found.append(f"node {report.node} shows {report.devices} devices, but {report.ranks_here} ranks stand on it")
    if report.memory is not None and report.memory < config.free_memory:
        found.append(
            f"{_who(report)} has {report.memory:.0%} of its device's memory free, less than cluster.preflight.free_memory={config.free_memory}: "
            "another process holds the rest"
        )
    if report.host_memory is not None and report.host_memory < config.host_memory_bytes:
        found.append(
            f"node {report.node} has {report.host_memory / 1e9:.1f} GB of memory free, less than cluster.preflight.host_memory_bytes="
            f"{config.host_memory_bytes}"
        )
    if report.clock is not None and abs(report.clock[0]) - report.clock[1] > config.clock_seconds:
        way = "ahead of" if report.clock[0] > 0 else "behind"
        found.append(
            f"node {report.node}'s clock is {abs(report.clock[0]):.1f} s {way} the first node's, more than cluster.preflight.clock_seconds="
            f"{config.clock_seconds}"
        )
    if report.disk is not None:
        speed, free = report.disk
        if speed < config.disk_bytes_per_second:
            found.append(
                f"node {report.node} writes {speed / 1e6:.1f} MB/s into the run directory, less than cluster.preflight.disk_bytes_per_second="
                f"{config.disk_bytes_per_second:g}"
            )
        if free < config.free_disk_bytes:
            found.append(
                f"node {report.node} has {free / 1e9:.1f} GB free for the run directory, less than cluster.preflight.free_disk_bytes="
                f"{config.free_disk_bytes}"
            )
    if report.unreadable:
        found.append(f"node {report.node} cannot read the data: {report.unreadable}")
    return found


def _versions(reports: Sequence[Report]) -> list[str]:
    """Who differs from most; where two are as frequent, from the first rank."""
    found = []
    for name in dict.fromkeys(name for report in reports for name in report.versions):
        counts = Counter(report.versions.get(name, "none") for report in reports if not report.error)
        first = next((report.versions.get(name, "none") for report in reports if not report.error), "none")
        usual = max(counts, key=lambda value: (counts[value], value == first), default="none")
        for report in reports:
            own = report.versions.get(name, "none")
            if own != usual and not report.error:
                found.append(f"node {report.node} has {name} {own}, but most have {usual}: all nodes must run the same")
    return found


def _speeds(reports: Sequence[Report], config: PreflightConfig) -> list[str]:
    speeds = [report.flops for report in reports if report.flops is not None]
    if not speeds:
        return []
    usual = median(speeds)
    return [
        f"{_who(report)} multiplies matrices at {report.flops / 1e9:,.1f} GFLOP/s, {report.flops / usual:.0%} of the median "
        f"{usual / 1e9:,.1f}, less than cluster.preflight.gemm_share={config.gemm_share}"
        for report in reports
        if report.flops is not None and report.flops < config.gemm_share * usual
    ]


def slow_meetings(meetings: Sequence[Meeting], config: PreflightConfig) -> list[str]:
    """A node that is slow with most it met, and pairs that are slow with each other only."""
    if not meetings:
        return []
    usual = median(meeting.bytes_per_second for meeting in meetings)
    slow = [meeting for meeting in meetings if meeting.bytes_per_second < config.bandwidth_share * usual]
    met: defaultdict[str, list[Meeting]] = defaultdict(list)
    for meeting in meetings:
        for node in meeting.nodes:
            met[node].append(meeting)
    bad = {
        node: median(meeting.bytes_per_second for meeting in own)
        for node, own in met.items()
        if len(own) > 1 and sum(meeting in slow for meeting in own) > len(own) / 2
    }
    found = [
        f"node {node} reduces {speed / 1e6:,.0f} MB/s with others, {speed / usual:.0%} of the median {usual / 1e6:,.0f}, less than "
        f"cluster.preflight.bandwidth_share={config.bandwidth_share}"
        for node, speed in bad.items()
    ]
    return found + [
        f"nodes {' and '.join(meeting.nodes)} reduce {meeting.bytes_per_second / 1e6:,.0f} MB/s between them, "
        f"{meeting.bytes_per_second / usual:.0%} of the median {usual / 1e6:,.0f}, less than cluster.preflight.bandwidth_share="
        f"{config.bandwidth_share}"
        for meeting in slow
        if not set(meeting.nodes) & bad.keys()
    ]


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """A tournament: in each round every node meets one other (of an odd number one rests), after all rounds each has met each."""
    seats = list(range(nodes + nodes % 2))
    played = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[place], seats[-1 - place]) for place in range(len(seats) // 2)]
        played.append([(min(pair), max(pair)) for pair in pairs if max(pair) < nodes])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return played
