"""Where the ranks of a gang meet: the sockets on which rank 0 may listen."""

import contextlib
import socket
from collections.abc import Iterator

# All the other ranks may come before rank 0 accepts the first.
BACKLOG = 1024


@contextlib.contextmanager
def listeners(address: str, count: int) -> Iterator[list[socket.socket]]:
    """So many sockets on free ports. Nobody accepts in this process: the trainers inherit them. Raises OSError."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_listener(address)) for _ in range(count)]


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _listener(address: str) -> socket.socket:
    try:
        return socket.create_server((address, 0), family=family(address), backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {address} for the ranks of a gang: {error}") from error
