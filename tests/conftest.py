"""Fixtures that everybody may use."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from helpers.databases import Databases, embedded_postgres
from helpers.fake_nvml import FakeClock, compiled, environ, load
from helpers.store import Store
from ops_backend.database import Sessions
from ops_worker.energy.nvml import Driver

# A shell that runs the tests in the background ignores SIGINT, and processes that we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How fast the machine is proves nothing.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(scope="session")
def databases(request: pytest.FixtureRequest) -> Iterator[Databases]:
    """Of this run's own Postgres, or of one that is kept for many runs (helpers/kept_postgres.py)."""
    if kept := os.environ.get("RELIGHT_TEST_DATABASES"):
        databases = Databases(*kept.split())
        yield databases
        asyncio.run(databases.drop())
    else:
        yield Databases(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def database_url(databases: Databases) -> AsyncIterator[str]:
    url = await databases.fresh()
    yield url
    await databases.give_back(url)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    sessions = Sessions(database_url, pool_size=20)
    yield Store(sessions)
    await sessions.dispose()


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver's library, for processes of their own by `environ`, for this one by `load`."""
    try:
        return compiled(tmp_path_factory.mktemp("nvml"))
    except FileNotFoundError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def fake_clock(tmp_path: Path) -> Iterator[FakeClock]:
    clock = FakeClock(tmp_path / "clock")
    yield clock
    clock.close()


@pytest.fixture
def fake_driver(
    fake_nvml: Path, fake_clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Driver]]:
    """NVML in this process, opened, that plays a script; its times count from the clock's beginning."""
    load(fake_nvml)
    opened: list[Driver] = []
    epoch_s = fake_clock()

    def play(script: str) -> Driver:
        (tmp_path / "script").write_text(f"epoch {epoch_s}\n{script}\n")
        for name, value in environ(fake_nvml, tmp_path / "script", fake_clock).items():
            monkeypatch.setenv(name, value)
        driver = Driver.open()
        assert driver is not None
        opened.append(driver)
        return driver

    yield play
    for driver in opened:
        driver.close()


@pytest.fixture
def numerics_given_back() -> Iterator[None]:
    """For trainings in this process: an attempt configures the whole of it."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
