"""Processes of a server: only the engine's has MindSpore, it shares what both imported, and ends with the server."""

import re
from pathlib import Path

import psutil
import pytest

from tests.servers import DEMO, Server, serve

pytestmark = pytest.mark.serving


def processes(server: Server) -> tuple[psutil.Process, psutil.Process]:
    """The server's and the engine's."""
    front = psutil.Process(server.process.pid)
    (engine,) = (child for child in front.children(recursive=True) if "EngineCore" in child.cmdline()[0])
    return front, engine


def test_only_the_engine_loads_mindspore(demo: Server) -> None:
    front, engine = processes(demo)
    assert "/mindspore/" not in Path(f"/proc/{front.pid}/maps").read_text()
    assert "/mindspore/" in Path(f"/proc/{engine.pid}/maps").read_text()


def test_the_engine_shares_imported_modules_with_the_server(demo: Server) -> None:
    rollup = Path(f"/proc/{processes(demo)[1].pid}/smaps_rollup").read_text()
    found = re.search(r"^Shared_Dirty: +(\d+) kB", rollup, re.MULTILINE)
    assert found is not None and int(found[1]) > 100 << 10


def test_the_engine_ends_with_a_killed_server() -> None:
    with serve(DEMO, "--max-model-len", "256") as server:
        front, engine = processes(server)
        front.kill()
        engine.wait(20)


@pytest.mark.slow
def test_two_ranks_answer_on_cpus_of_their_own_and_end_with_a_killed_server() -> None:
    with serve(DEMO, "--served-model-name", "demo", "--max-model-len", "256", "--tensor-parallel-size", "2") as server:
        front = psutil.Process(server.process.pid)
        ranks = [child for child in front.children(recursive=True) if "Worker_TP" in child.cmdline()[0]]
        cpus = [set(rank.cpu_affinity()) for rank in ranks]
        assert len(cpus) == 2
        assert len(front.cpu_affinity()) == 1 or not cpus[0] & cpus[1]
        answer = server.client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "What is 12 + 7?"}], temperature=0
        )
        assert answer.choices[0].message.content == "19"
        front.kill()
        psutil.wait_procs(ranks, 20)
        assert not any(rank.is_running() for rank in ranks)
