"""Procrastinate's two sides, in an environment of its own: who defers no-op jobs, and the worker that runs them.

python procrastinate_peer.py client|worker CONNINFO CONCURRENCY
"""

import asyncio
import json
import sys

from procrastinate import App, PsycopgConnector


def main() -> None:
    side, conninfo, concurrency = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # One connection for what listens.
    app = App(connector=PsycopgConnector(conninfo=conninfo, min_size=concurrency + 1, max_size=concurrency + 1))

    @app.task(name="nothing")
    async def nothing(n: int) -> None:
        pass

    async def client() -> None:
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            say(ready=True)
            loop = asyncio.get_running_loop()
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                numbers = iter(range(json.loads(line)["jobs"]))

                async def defer(numbers=numbers) -> None:
                    for n in numbers:
                        await nothing.defer_async(n=n)

                await asyncio.gather(*(defer() for _ in range(concurrency)))
                say(deferred=True)

    async def worker() -> None:
        async with app.open_async():
            say(ready=True)
            await app.run_worker_async(concurrency=concurrency)

    asyncio.run(client() if side == "client" else worker())


def say(**what: bool) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
