"""TCP ports of this machine, at which ranks find each other."""

import contextlib
import socket


def can_bind_port() -> bool:
    """Tell whether a TCP port of this machine can be used by ranks to find each other."""
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return True
    return False
