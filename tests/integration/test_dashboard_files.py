"""What the dashboard's own files are served as. It needs no database."""

import gzip
import re
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from test_api import refusal

from ops_backend import pages
from ops_backend.app import create_app
from ops_backend.settings import Settings

ROOT = Path(__file__).parents[2]
POLICY = "content-security-policy"


@pytest.fixture
async def web() -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(database_url="postgresql://x/y", api_token="x" * 16, storage_root=Path("/")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_the_page_allows_no_script_but_ours_and_nobody_to_frame_it(web: httpx.AsyncClient) -> None:
    page = await web.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    rules = dict(rule.split(" ", 1) for rule in page.headers[POLICY].split("; "))
    assert (rules["default-src"], rules["script-src"], rules["connect-src"]) == ("'none'", "'self'", "'self'")
    assert (rules["frame-ancestors"], rules["base-uri"]) == ("'none'", "'none'")
    assert "//" not in page.headers[POLICY]
    assert not re.findall(r"<script(?![^>]* src=)|<style| on\w+=| style=", page.text)


async def test_every_file_that_the_page_and_the_modules_name_is_there_for_good(web: httpx.AsyncClient) -> None:
    page = (await web.get("/")).text
    asked = re.findall(r'(?:href|src|data-plotly)="(/[^"]+)"', page)
    assert len(asked) == 5
    while asked:
        path = asked.pop()
        answer = await web.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["x-content-type-options"] == "nosniff"
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[path.rpartition(".")[2]]
        assert answer.headers["content-type"].partition(";")[0] == kind
        if "plotly" not in path:
            asked += [f"{path.rpartition('/')[0]}/{name}" for name in re.findall(r'from "\./(\w+\.js)"', answer.text)]


@pytest.mark.parametrize(
    "path", ["/", f"/dashboard/{pages.release()}/main.js", f"/dashboard/vendor/{pages.plotly_name()}"]
)
async def test_what_a_browser_has_is_not_sent_again_and_packed_where_it_may_be(
    web: httpx.AsyncClient, path: str
) -> None:
    whole = await web.get(path, headers={"Accept-Encoding": "identity"})
    packed = await web.get(path, headers={"Accept-Encoding": "gzip, br"})
    head = await web.head(path)
    again = await web.get(path, headers={"If-None-Match": whole.headers["etag"]})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == whole.content
    assert int(packed.headers["content-length"]) == len(gzip.compress(whole.content, 6, mtime=0)) < len(whole.content)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", whole.headers["etag"])
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", whole.headers["etag"])


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/dashboard/0/main.js",
        f"/dashboard/{pages.release()}/index.html",
        f"/dashboard/{pages.release()}/nothing.js",
        f"/dashboard/{pages.release()}/..%2fpages.py",
        f"/dashboard/{pages.release()}/%2e%2e/pages.py",
        "/dashboard/vendor/plotly-0.min.js",
        "/dashboard/vendor/main.js",
        "/api/v1/nothing",
    ],
)
async def test_there_is_nothing_else(web: httpx.AsyncClient, path: str) -> None:
    assert refusal(await web.get(path)) == (404, "not_found")


def test_nothing_in_the_dashboard_makes_markup_of_text_or_names_another_host() -> None:
    for path in pages.DIRECTORY.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|https?://", text
        ), path


def test_plotly_is_not_imported_for_its_file() -> None:
    code = "import sys; from ops_backend import pages; pages.plotly_name(); assert 'plotly' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_wheel_has_the_dashboard(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"ops_backend/dashboard/{path.name}" for path in pages.DIRECTORY.iterdir()} <= set(names)
