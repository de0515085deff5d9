"""One running service for the tests whose meaning allows to share it."""

import asyncio
from collections.abc import Iterator
from uuid import UUID

import pytest

from helpers.databases import Databases
from helpers.service import LONG, Service, running_service


@pytest.fixture(scope="package")
def shared_service(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    url = asyncio.run(databases.fresh())
    with running_service(tmp_path_factory.mktemp("service"), url, workers=2) as service:
        yield service


@pytest.fixture
def service(shared_service: Service) -> Service:
    """Two live workers, whatever the test before has killed."""
    shared_service.have_workers(2)
    return shared_service


@pytest.fixture(scope="package")
def undisturbed_id(shared_service: Service) -> UUID:
    """A run that nobody disturbed."""
    id = shared_service.submit(**LONG)
    shared_service.wait(id, "completed")
    return id


@pytest.fixture(scope="package")
def undisturbed(shared_service: Service, undisturbed_id: UUID) -> dict[str, list[tuple[int, float]]]:
    """Every value of every metric of it."""
    return shared_service.curves(undisturbed_id)
