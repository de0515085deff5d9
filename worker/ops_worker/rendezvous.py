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
        yield [
            stack.enter_context(listen(address, 0, BACKLOG, f"{address} for the ranks of a gang")) for _ in range(count)
        ]


def listen(address: str, port: int, backlog: int, where: str) -> socket.socket:
    """Raises OSError that says where."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=backlog)
    except OSError as error:
        raise OSError(f"cannot listen on {where}: {error}") from error
