"""One Postgres for many runs of the tests, until stdin ends: says its URL and the name of a template of our schema."""

import asyncio
import sys
import tempfile
from pathlib import Path

from helpers.databases import Databases, embedded_postgres

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory, embedded_postgres(Path(directory)) as url:
        print(url, asyncio.run(Databases(url).template()), flush=True)
        sys.stdin.read()
