"""TCP ports of this machine, at which ranks find each other."""

import contextlib
import random
import socket

from enc.encoder.errors import UsageError

_PORTS = range(20_000, 30_000)  # below the ports that systems give out by themselves


def can_bind_port() -> bool:
    """Tell whether a TCP port of this machine can be used by ranks to find each other."""
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return True
    return False


def free_port() -> int:
    """Return a port for the ranks to meet at, free on this machine; a random one, for others look at the same time."""
    start = random.SystemRandom().randrange(len(_PORTS))
    ports: list[int] = [*_PORTS[start:], *_PORTS[:start]]
    for port in ports:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UsageError(f"All ports from {_PORTS[0]} to {_PORTS[-1]} are taken on this machine.")
