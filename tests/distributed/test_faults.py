"""A process of a server that dies under load: the server ends, its clients learn of it, and nothing is left.

Real servers, forked (vLLM's command by default) and spawned. Every test starts a server of its own.
"""

import os
import signal
import socket
import time

import pytest

from tests.distributed.faults import (
    CLIENTS,
    LAYOUTS,
    LIMIT,
    Crowd,
    Process,
    of_kind,
    processes,
    ray_nodes,
    serving,
    shared_memory,
)
from tests.servers import Server

pytestmark = pytest.mark.serving

# Kinds of processes of each layout.
DYING = {
    "one": ("engine", "server"),
    "tp2": ("worker", "engine", "server"),
    "pp2": ("worker", "engine", "server"),
    "dp2": ("engine", "coordinator", "front end", "server"),
    "dp2-ep": ("engine", "coordinator", "front end", "server"),
}
QUICK = (("tp2", "worker", "fork", 0), ("tp2", "server", "fork", 0))
OFTEN = (("tp2", "worker", "fork"), ("tp2", "engine", "fork"), ("tp2", "server", "fork"))
TIMES = 10
CASES = [
    pytest.param(
        *case, number, id="-".join([*case, str(number)]), marks=() if (*case, number) in QUICK else pytest.mark.slow
    )
    for case in ((layout, kind, method) for layout in LAYOUTS for kind in DYING[layout] for method in ("fork", "spawn"))
    for number in range(TIMES if case in OFTEN else 1)
]


def wait_for_end(server: Server, nodes: int | None, end: float) -> list[Process]:
    """Until no process is left, or until `end`: those that are left."""
    while (left := processes(server, nodes)) and time.monotonic() < end:
        server.process.poll()  # else it stays as a zombie
        time.sleep(0.2)
    return left


def check_port(port: int) -> None:
    """That a server could listen there again, as vLLM does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))


def check_report(server: Server, kind: str, number: int) -> None:
    """The exit code and, of a process that died, a sentence."""
    code = server.process.wait(1)
    if number == signal.SIGKILL and kind == "server":
        assert code == -signal.SIGKILL
    elif number == signal.SIGKILL:
        assert code > 0
        assert "died" in server.log


def end_under_load(server: Server, kind: str, number: int, limit: float, nodes: int | None = None) -> None:
    """Send a signal to a process of a server with clients, and check that all ends within `limit` seconds.

    `nodes` is the session of the Ray nodes that its ranks are on.
    """
    with Crowd(server.url) as crowd:
        crowd.enter(CLIENTS)
        found = processes(server, nodes)
        memory = shared_memory(found)
        chosen = of_kind(found, kind, server)[0]
        start = time.monotonic()
        os.kill(chosen.pid, number)
        crowd.enter(CLIENTS // 2, wait=False)
        left = wait_for_end(server, nodes, start + limit)
        assert not left, server.log[-4000:]
        outcomes = crowd.outcomes(max(1.0, start + limit - time.monotonic()))
    check_report(server, kind, number)
    # On a busy machine an answer may be whole by then: clients read on after the server has written the last token.
    assert any(outcome.knows for outcome in outcomes), outcomes
    assert [outcome for outcome in outcomes if not (outcome.knows or outcome.whole)] == []
    assert max(outcome.ended for outcome in outcomes) - start < limit
    check_port(server.port)
    if nodes is None:  # Ray kills the processes that would remove the names of its ranks
        assert not [name for name in memory if name.exists()]


@pytest.mark.parametrize(("layout", "kind", "method", "number"), CASES)
def test_a_killed_process(layout: str, kind: str, method: str, number: int) -> None:
    env = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"} if method == "spawn" else {}
    with serving(layout, env=env) as server:
        end_under_load(server, kind, signal.SIGKILL, LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*["ray worker"] * TIMES, "engine", "server"])
def test_a_killed_process_of_a_server_on_ray(kind: str) -> None:
    with ray_nodes() as (nodes, env), serving("tp2", "--distributed-executor-backend", "ray", env=env) as server:
        end_under_load(server, kind, signal.SIGKILL, LIMIT, nodes)


STOPS = [
    pytest.param(layout, number, marks=() if (layout, number) == ("one", signal.SIGTERM) else pytest.mark.slow)
    for layout in LAYOUTS
    for number in (signal.SIGTERM, signal.SIGINT)
]


@pytest.mark.parametrize(("layout", "number"), STOPS)
def test_a_server_that_is_told_to_stop(layout: str, number: signal.Signals) -> None:
    with serving(layout) as server:
        end_under_load(server, "server", number, LIMIT / 2)
