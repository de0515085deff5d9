"""A Postgres of these tests' own, which they may kill."""

from collections.abc import Iterator

import pytest

from chaos.cluster import OwnPostgres
from helpers.service import eventually


@pytest.fixture(scope="package")
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnPostgres]:
    """Its second start is the one that counts: `remember_commits` takes effect then."""
    postgres = OwnPostgres(tmp_path_factory.mktemp("postgres"))
    postgres.start()
    try:
        postgres.remember_commits()
        first = postgres.postmaster()
        assert first is not None
        first.terminate()
        eventually(lambda: postgres.postmaster() not in (None, first) and postgres.answers(), "Postgres is back")
        yield postgres
    finally:
        postgres.stop()
