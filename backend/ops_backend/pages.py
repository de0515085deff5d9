"""The dashboard's own files, and the one of plotly's that draws its curves, as they go over the wire."""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

DIRECTORY = Path(__file__).parent / "dashboard"
INDEX = "index.html"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Page:
    """`tag` is quoted, as it stands in `ETag`."""

    body: bytes
    packed: bytes
    media_type: str
    tag: str


@cache
def release() -> str:
    """Names the files as they are: an upgraded server's page never loads a module of the one before."""
    digest = hashlib.sha256()
    for name, body in sorted(_files().items()):
        digest.update(f"{name} {len(body)} ".encode() + body)
    return digest.hexdigest()[:16]


@cache
def index() -> Page:
    """The page itself, which names where the rest of this release is."""
    text = _files()[INDEX].decode().replace("{release}", release()).replace("{plotly}", plotly_name())
    return _page(text.encode(), ".html")


@cache
def assets() -> dict[str, Page]:
    """All the others, by name."""
    return {name: _page(body, Path(name).suffix) for name, body in _files().items() if name != INDEX}


@cache
def plotly_name() -> str:
    return f"plotly-{distribution('plotly').version}.min.js"


@cache
def plotly() -> Page:
    """Found without importing the package, which takes a second and the backend does not need."""
    path = Path(str(distribution("plotly").locate_file("plotly/package_data/plotly.min.js")))
    return _page(path.read_bytes(), path.suffix)


@cache
def _files() -> dict[str, bytes]:
    """Read once, together: an upgrade under a running server changes nothing of what it serves."""
    return {path.name: path.read_bytes() for path in DIRECTORY.iterdir() if path.suffix in _TYPES}


def _page(body: bytes, suffix: str) -> Page:
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return Page(body, gzip.compress(body, 6, mtime=0), _TYPES[suffix], tag)
