"""What `python -m ops_backend doctor` says of a real database and a real directory."""

import asyncio
import os
from pathlib import Path

import pytest
from sqlalchemy import make_url

from helpers.store import Store
from ops_backend import doctor


async def states(url: str | None, root: Path | None, data_dir: Path | None = None) -> dict[str, str]:
    found = await asyncio.to_thread(doctor.examine, data_dir, url, root)
    assert all(item.advice for item in found.items if item.state != "ok")
    return {item.check: item.state for item in found.items}


async def test_a_service_in_order_is_all_ok(store: Store, database_url: str, tmp_path: Path) -> None:
    assert (await states(database_url, tmp_path))["reaper"] == "warn", "no API has run here yet"
    await store.tick()

    found = await states(database_url, tmp_path)

    assert set(found.values()) == {"ok"}
    assert {"database", "clock of the database", "migrations", "reaper", "storage", "free space"} == set(found)
    assert os.listdir(tmp_path) == [], "it leaves nothing behind"


async def test_a_schema_of_another_version_is_said(store: Store, database_url: str, tmp_path: Path) -> None:
    await store.execute("UPDATE alembic_version SET version_num = '0007'")
    assert (await states(database_url, tmp_path))["migrations"] == "fail"
    await store.execute("DROP TABLE alembic_version")
    assert (await states(database_url, tmp_path))["migrations"] == "fail"


async def test_storage_that_is_missing_or_refuses_is_said(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await states(database_url, tmp_path / "none"))["storage"] == "fail"

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "rename", refuse)
    assert (await states(database_url, tmp_path))["storage"] == "fail"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("url", ["mysql://h/d", "postgresql://u:p@127.0.0.1:9/none", "postgresql://u:p@/d?host=/none"])
async def test_a_database_that_cannot_be_reached_is_said(url: str, tmp_path: Path) -> None:
    found = await states(url, tmp_path)
    assert (found["database"], found["storage"]) == ("fail", "ok")


async def test_a_database_that_refuses_is_said(postgres_url: str, tmp_path: Path) -> None:
    absent = make_url(postgres_url).set(database="absent").render_as_string(hide_password=False)
    assert (await states(absent, tmp_path))["database"] == "fail"


async def test_the_database_of_ops_up_is_found_by_its_directory(postgres_url: str, tmp_path: Path) -> None:
    found = await states(None, None, tmp_path)
    assert (found["embedded postgres"], found["storage"]) == ("fail", "fail")

    data_dir = Path(str(make_url(postgres_url).query["host"])).parent
    found = await states(None, tmp_path, data_dir)
    assert (found["embedded postgres"], found["database"]) == ("ok", "ok")
    assert found["migrations"] == "fail", "this one has no schema of ours"
