"""One soak: a server under load, measured when it is idle after a warm-up, and again at the end."""

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.distributed.faults import Process, processes, shared_memory
from tests.servers import Server, serve
from tests.soak.clients import Outcomes, load
from tests.soak.questions import BASE, LENGTH, model, questions, random_adapters, references

GROWTH = 0.02  # of resident memory, at most
WARM_UP = 0.25  # of the time
END = 15.0  # seconds until nothing of a server may be left
QUIET = 30.0  # seconds until an idle server must be seen as one
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass(frozen=True)
class Measures:
    """Of all processes of an idle server together."""

    processes: int
    rss: int  # bytes
    threads: int
    descriptors: int
    shared: frozenset[Path]  # names in /dev/shm

    @classmethod
    def of(cls, server: Server) -> "Measures":
        found = processes(server)
        rss, threads, descriptors = (sum(values) for values in zip(*map(_of_process, found), strict=True))
        return cls(len(found), rss, threads, descriptors, frozenset(shared_memory(found)))


def _of_process(process: Process) -> tuple[int, int, int]:
    folder = Path("/proc") / str(process.pid)
    status = (folder / "status").read_text()
    rss, threads = (int(re.findall(rf"^{name}:\s+(\d+)", status, re.M)[0]) for name in ("VmRSS", "Threads"))
    return rss * 1024, threads, len(list((folder / "fd").iterdir()))


@dataclass(frozen=True)
class Report:
    """What a soak has shown."""

    outcomes: Outcomes
    warm: Measures
    end: Measures
    gauges: Mapping[str, float]
    preemptions: float
    left: list[str]  # processes and names after the server's end

    def problems(self) -> list[str]:
        """One sentence each; none of a soak that went well."""
        found = list(self.outcomes.faults)
        growth = self.end.rss / self.warm.rss - 1
        if growth >= GROWTH:
            found.append(f"resident memory grew by {growth:.2%}, and less than {GROWTH:.0%} is allowed.")
        for what in ("processes", "threads", "descriptors"):
            before, after = getattr(self.warm, what), getattr(self.end, what)
            if after > before:
                found.append(f"{what} grew from {before} to {after}.")
        if more := self.end.shared - self.warm.shared:
            found.append(f"there are more names in /dev/shm: {', '.join(map(str, sorted(more)))}.")
        found += [f"{name} is {value:g} at the end, not 0." for name, value in self.gauges.items() if value]
        if not self.outcomes.counts["whole"] or not self.outcomes.counts["streamed"]:
            found.append("nothing was answered.")
        return found + [f"left behind: {what}." for what in self.left]

    def table(self) -> str:
        """As text, for a terminal."""
        warm, end = self.warm, self.end
        lines = [f"{'':<14}{'warm':>14}{'end':>14}"]
        lines.append(
            f"{'memory, MiB':<14}{warm.rss / 2**20:>14.1f}{end.rss / 2**20:>14.1f}{end.rss / warm.rss - 1:>+10.2%}"
        )
        for what in ("processes", "threads", "descriptors"):
            lines.append(f"{what:<14}{getattr(warm, what):>14}{getattr(end, what):>14}")
        lines.append(f"{'in /dev/shm':<14}{len(warm.shared):>14}{len(end.shared):>14}")
        lines.append(
            "requests: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.outcomes.counts.items()))
        )
        lines.append(f"tokens compared or counted: {self.outcomes.tokens}; preemptions: {self.preemptions:g}")
        return "\n".join(lines)


def soak(seconds: float, clients: int, adapter_count: int = 3, seed: int = 0) -> Report:
    """Clients switch between the model and so many adapters of it, of which two at most are loaded at a time."""
    folder = model()
    adapters = random_adapters(adapter_count)
    asked = questions(references(folder, adapters), 48, seed)
    options = ["--served-model-name", BASE, "--dtype", "float32", "--max-model-len", str(LENGTH)]
    options += ["--max-num-seqs", str(max(1, clients // 2)), "--disable-uvicorn-access-log"]
    options += ["--kv-cache-memory-bytes", str(3 * 2**19)]  # too little: some have to wait, and some are preempted
    if adapters:
        options += ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2"]
        options += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    with serve(folder, *options) as server:
        asyncio.run(load(server.url, asked, clients, seconds * WARM_UP, seed + 1))
        idle(server)
        warm = Measures.of(server)
        outcomes = asyncio.run(load(server.url, asked, clients, seconds * (1 - WARM_UP), seed + 2))
        gauges = idle(server)
        end = Measures.of(server)
        preemptions = metric(server, "vllm:num_preemptions_total")
    stop = time.monotonic() + END
    while processes(server) and time.monotonic() < stop:
        time.sleep(0.1)
    left = [process.title for process in processes(server)] + [str(name) for name in end.shared if name.exists()]
    return Report(outcomes, warm, end, gauges, preemptions, left)


def idle(server: Server) -> dict[str, float]:
    """Waits until the server has nothing to do, or QUIET: the gauges that must be 0 then."""
    stop = time.monotonic() + QUIET
    while True:
        time.sleep(1)  # connections of clients that have gone are closed in that time, too
        found = {name: metric(server, name) for name in GAUGES}
        if not any(found.values()) or time.monotonic() > stop:
            time.sleep(2)
            return found


def metric(server: Server, name: str) -> float:
    """Of the server's Prometheus page, summed over labels."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.M)
    assert values, f"the server has no metric {name}"
    return sum(map(float, values))
