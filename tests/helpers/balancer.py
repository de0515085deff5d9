"""One address for several replicas, as a load balancer gives it: each connection goes to the next one that takes it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ops_cli.up import free_port


@contextmanager
def balancing() -> Iterator[tuple[str, list[int]]]:
    """Its address, and the ports of the replicas, which the caller changes as he likes."""
    address, ports = free_port(), list[int]()
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ports.append(ports.pop(0))
        try:
            upstream = await asyncio.open_connection("127.0.0.1", ports[0])
        except OSError:
            writer.close()
            return
        pumps = {asyncio.create_task(pump(reader, upstream[1])), asyncio.create_task(pump(upstream[0], writer))}
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, upstream[1]):
            end.close()
        await asyncio.wait(pumps)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", address))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{address}", ports
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
