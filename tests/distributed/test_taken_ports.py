"""Servers whose ports are taken: each ends with a sentence, and leaves nothing behind."""

import socket
from collections.abc import Iterator

import pytest

from tests.distributed.faults import LAYOUTS, OPTIONS, model
from tests.distributed.leftovers import none_left
from tests.servers import free_port, started
from vllm_ms_models import ports

pytestmark = pytest.mark.serving
ENDED = 90.0  # seconds, most of them for a start on a busy machine


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which something listens that shares it with others (as front ends of one server do)."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def bound_to(port: int) -> socket.socket:
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    own.bind(("127.0.0.1", port))
    return own


def test_a_port_that_would_be_shared(taken: int) -> None:
    with bound_to(taken), pytest.raises(ValueError, match=f"listens at 127.0.0.1:{taken}, .*choose another --port"):
        ports.check_ports()


def test_a_port_of_ones_own() -> None:
    with bound_to(free_port()) as own:
        ports.check_ports()
        own.listen()
        ports.check_ports()


HERE = ("--data-parallel-size-local", "1", "--data-parallel-address", "127.0.0.1")
TWO_NODES = ("--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "more", "flag", "sentence"),
    [
        ("one", (), "--port", "Address already in use"),
        ("dp2", (), "--port", "and the two would share the requests"),
        ("dp2-ep", HERE, "--data-parallel-rpc-port", "Address already in use"),
        ("tp2", TWO_NODES, "--master-port", "EADDRINUSE"),
    ],
)
def test_a_server(layout: str, more: tuple[str, ...], flag: str, sentence: str, taken: int) -> None:
    family, options = LAYOUTS[layout]
    port = [] if flag == "--port" else ["--port", str(free_port())]
    given = [*options, *more, *OPTIONS, "--host", "127.0.0.1", *port, flag, str(taken)]
    with none_left() as sessions, started(str(model(family)), *given) as server:
        sessions.append(server.process.pid)
        assert server.process.wait(ENDED) != 0
        assert sentence in server.log, server.log[-6000:]
