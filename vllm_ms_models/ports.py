"""A server of several front ends lets them share its port, and so would share it with another such server unasked."""

import contextlib
import os
import socket


def check_ports() -> None:
    """In the first process of a server, before it listens: ValueError if another one listens where this one will."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as own:
            if _to_be_shared(own) and _answers(own):
                host, port = own.getsockname()[:2]
                raise ValueError(
                    f"Another server listens at {host}:{port}, and the two would share the requests; "
                    "end it, or choose another --port."
                )


def _to_be_shared(own: socket.socket) -> bool:
    """Whether it is bound to a port that others may be bound to as well, and not listening yet."""
    return (
        own.family in (socket.AF_INET, socket.AF_INET6)
        and own.type == socket.SOCK_STREAM
        and bool(own.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))
        and not own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        and own.getsockname()[1] != 0
    )


def _answers(own: socket.socket) -> bool:
    with socket.socket(own.family, socket.SOCK_STREAM) as other:
        other.settimeout(1)
        return other.connect_ex(own.getsockname()) == 0
