"""The API that most of these tests talk to."""

from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import pytest

from helpers.openapi import openapi_of_this_code
from ops_backend.app import create_app
from ops_backend.dispatcher import Dispatcher
from ops_backend.settings import Settings

TOKEN = "a token of the tests"


@pytest.fixture
async def api(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """In this process, with all its loops; every answer is held against the OpenAPI document."""
    monkeypatch.setattr(Dispatcher, "_claim_all", AsyncMock())  # the tests claim by themselves
    app = create_app(Settings(database_url=database_url, api_token=TOKEN, storage_root=tmp_path, poll_s=0.02))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test/api/v1", headers=headers) as client,
    ):
        openapi_of_this_code().watch_async(client)
        yield client
