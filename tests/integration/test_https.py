"""The API over TLS, by its own settings; and whose word of an address counts behind a proxy."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from helpers.service import eventually
from ops_backend.app import create_app
from ops_backend.serving import Server
from ops_backend.settings import Settings, SettingsError
from ops_cli.child import Child
from ops_cli.doctor import _service
from relight.client import Client
from relight.settings import Server as Known

TOKEN = "a token of the tests"


def made_certificate(directory: Path, *, days: int = 2) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subject = ["-subj", "/CN=relight", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    files = ["-keyout", str(key), "-out", str(certificate), "-days", str(days)]
    subprocess.run([*made, *files, *subject], check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def environ(database_url: str, tmp_path: Path) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OPS_")}
    ours = {"OPS_DATABASE_URL": database_url, "OPS_API_TOKEN": TOKEN, "OPS_STORAGE_ROOT": str(tmp_path)}
    return inherited | ours | {"OPS_PORT": "0"}


@pytest.fixture
def url(environ: dict[str, str], tmp_path: Path) -> Iterator[str]:
    certificate, key = made_certificate(tmp_path)
    environ |= {"OPS_TLS_CERT": str(certificate), "OPS_TLS_KEY": str(key)}
    server = Child("server", ("ops_backend", "server"), lambda: environ, tmp_path / "server.log")
    server.start()
    try:
        yield eventually(lambda: server.ready, "the API is ready", (tmp_path / "server.log").read_text)["url"]
    finally:
        server.kill()
        server.close()


def test_clients_reach_it_by_https(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert url.startswith("https://127.0.0.1:")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    with Client(url, TOKEN) as client:
        assert list(client.list(limit=1)) == []
    assert [found.state for found in _service(Known(url, TOKEN, "of the test")) if found.check == "API"] == ["ok"]
    curl = ["curl", "-sf", "--noproxy", "*", "--cacert", str(tmp_path / "cert.pem"), f"{url}/health/ready"]
    assert b'"ok"' in subprocess.run(curl, check=True, capture_output=True).stdout

    login = httpx.post(f"{url}/api/v1/session", json={"token": TOKEN}, verify=httpx.create_ssl_context())
    assert "secure" in login.headers["set-cookie"].lower()
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url.replace("https", "http"), trust_env=False)


def test_a_certificate_that_is_not_known_is_not_believed(url: str) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{url}/health/ready", trust_env=False)


def test_a_certificate_goes_with_its_key(tmp_path: Path) -> None:
    certificate, key = map(str, made_certificate(tmp_path))
    given = {"OPS_DATABASE_URL": "postgresql://x/y", "OPS_API_TOKEN": TOKEN, "OPS_STORAGE_ROOT": str(tmp_path)}
    for tls in ({"OPS_TLS_CERT": certificate}, {"OPS_TLS_KEY": key}):
        with pytest.raises(SettingsError, match="OPS_TLS_CERT and OPS_TLS_KEY go together"):
            Settings.from_env(given | tls)
    settings = Settings.from_env(given | {"OPS_TLS_CERT": certificate, "OPS_TLS_KEY": certificate})
    with pytest.raises(OSError, match="PEM"):
        Server(create_app(settings), settings, 0, True)


@pytest.mark.parametrize(("peer", "is_believed"), [("127.0.0.1", True), ("::1", True), ("10.1.2.3", False)])
async def test_only_a_proxy_of_this_machine_is_believed(
    database_url: str, tmp_path: Path, peer: str, is_believed: bool
) -> None:
    settings = Settings(database_url=database_url, api_token=TOKEN, storage_root=tmp_path)
    app = create_app(settings)
    served = Server(app, settings, 0, True).config.loaded_app
    transport = httpx.ASGITransport(served, client=(peer, 1))
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
        forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.7"}
        login = await client.post("http://test/api/v1/session", json={"token": TOKEN}, headers=forwarded)

    assert login.status_code == 204
    assert ("secure" in login.headers["set-cookie"].lower()) == is_believed
