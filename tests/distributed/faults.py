"""Servers under load for tests that kill their processes: the layouts, the clients, the processes, what is left."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import write_tokenizer
from tests.checkpoints import checkpoint
from tests.distributed.crowd import LENGTH, Outcome
from tests.distributed.leftovers import none_left
from tests.distributed.ray_nodes import ADDRESSES
from tests.servers import Server, serve

ROOT = Path(__file__).parents[2]
LIMIT = 30.0  # seconds until everything must have ended
CLIENTS = 8  # that are being answered when a process dies
VOCABULARY = 211

# Of each layout the model family and the options of `vllm serve`.
LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "one": ("qwen2", ()),
    "tp2": ("qwen2", ("--tensor-parallel-size", "2")),
    "pp2": ("qwen2", ("--pipeline-parallel-size", "2")),
    "dp2": ("qwen2", ("--data-parallel-size", "2")),
    "dp2-ep": ("qwen3_moe", ("--data-parallel-size", "2", "--enable-expert-parallel")),
}

# Process titles that vLLM and Ray set; the server's first process keeps its command line.
KINDS = {
    "worker": r"VLLM::Worker",
    "engine": r"VLLM::EngineCore",
    "coordinator": r"VLLM::DPCoordinator",
    "front end": r"VLLM::APIServer_\d",
    "ray worker": r"ray::RayWorkerProc",
}


def model(family: str) -> Path:
    """A tiny checkpoint with a tokenizer, whose generations may be long."""
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    folder = checkpoint(family, max_position_embeddings=2 * LENGTH, **(mixture if "moe" in family else {}))
    write_tokenizer(folder, VOCABULARY)
    return folder


# Of every server here.
OPTIONS = ["--served-model-name", "tiny", "--max-model-len", str(2 * LENGTH), "--max-num-seqs", "16"]
OPTIONS += ["--kv-cache-memory-bytes", "268435456"]
OPTIONS += ["--stream-interval", "10"]  # the clients are not to be the load


@contextmanager
def serving(layout: str, *more: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server of that layout; `more` are further options."""
    family, options = LAYOUTS[layout]
    with serve(model(family), *options, *OPTIONS, *more, env=env) as server:
        yield server


class Crowd:
    """Clients of a server: some being answered, some that come later. Ended with the block at the latest."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "tests.distributed.crowd", url]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def enter(self, count: int, *, wait: bool = True) -> None:
        """Let `count` more come in; wait until each has some tokens."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(count, file=self.process.stdin, flush=True)
        if wait:
            assert self.process.stdout.readline() == "answered\n"

    def outcomes(self, seconds: float) -> list[Outcome]:
        """Of all, once they have ended; subprocess.TimeoutExpired if that takes longer."""
        output, _ = self.process.communicate(timeout=seconds)
        return [Outcome(**outcome) for outcome in json.loads(output.splitlines()[-1])]


@contextmanager
def ray_nodes() -> Iterator[tuple[int, dict[str, str]]]:
    """Two nodes: the session of their processes, and the environment of a server that uses them."""
    command = [sys.executable, "-m", "tests.distributed.ray_nodes"]
    pipe = subprocess.PIPE
    nodes = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, start_new_session=True)
    assert nodes.stdin is not None and nodes.stdout is not None
    with none_left() as sessions:
        sessions.append(nodes.pid)
        try:
            address = next(line.strip() for line in nodes.stdout if line.startswith(ADDRESSES[0]))
            yield nodes.pid, {"RAY_ADDRESS": address, "VLLM_HOST_IP": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "lo"}
        finally:
            nodes.stdin.close()
            nodes.wait(60)


@dataclass(frozen=True)
class Process:
    """One of a server's; `title` is its command line, or the title that vLLM gave it."""

    pid: int
    title: str


def processes(server: Server, nodes: int | None = None) -> list[Process]:
    """All that run: the server is a session of its own, which orphans stay in. (psutil takes seconds under load.)

    `nodes` is the session of Ray's nodes, of which only the ranks belong to the server.
    """
    if nodes is not None:
        return [*processes(server), *of_kind(_session(nodes), "ray worker", server)]
    return _session(server.process.pid)


def _session(leader: int) -> list[Process]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == leader and state not in "ZX":
                    title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    found.append(Process(int(folder.name), title))
    return found


def of_kind(found: Sequence[Process], kind: str, server: Server) -> list[Process]:
    """Those of `KINDS`, or the server's first one ("server")."""
    if kind == "server":
        return [process for process in found if process.pid == server.process.pid]
    return [process for process in found if re.match(KINDS[kind], process.title)]


def shared_memory(found: Sequence[Process]) -> set[Path]:
    """Named shared memory of these processes, but for that by which OpenMP libraries in a process find each other."""
    lines: set[str] = set()
    for process in found:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines.update(Path(f"/proc/{process.pid}/maps").read_text().splitlines())
    names = {Path(line.split(maxsplit=5)[5]) for line in lines if "/dev/shm/" in line}
    return {name for name in names if name.exists() and not name.name.startswith("__KMP_REGISTERED_LIB_")}
