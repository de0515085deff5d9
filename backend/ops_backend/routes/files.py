"""A file of the storage root as an answer."""

import asyncio
import os
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import category

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from ops_backend.storage import open_file
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import ArtifactView

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILE = {"application/octet-stream": _BINARY, "image/png": _BINARY}
_PARTS = {"multipart/byteranges": _BINARY}
_PLAIN = {"text/plain": {"schema": {"type": "string"}}}

_PNG = b"\x89PNG\r\n\x1a\n"

_NOT_IN_A_NAME = frozenset('<>:"/\\|?*')
# Control and format characters (one of them turns the reading direction: exe.gpj), lone surrogates, line separators.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_DEVICE = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3]", re.IGNORECASE)

# For a route's documentation: those of FileResponse itself included.
FILE_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the whole file", "content": _FILE},
    206: {"description": "the ranges that were asked for", "content": _FILE | _PARTS},
    400: {"description": "a Range header that is none", "content": _PLAIN},
    416: {"description": "a range that the file does not have", "content": _PLAIN},
}


class ArtifactResponse(FileResponse):
    """Streams it from the descriptor that was checked, with ranges; ends with its client. A PNG may be shown."""

    chunk_size = 256 * 1024

    def __init__(self, root: Path, artifact: ArtifactView) -> None:
        name = safe_name(PurePosixPath(artifact.name).name)
        # Its bytes are whatever a training wrote: no browser may take them for a page of ours.
        headers = {"ETag": f'"{artifact.sha256}"', "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        super().__init__("", headers=headers, media_type="application/octet-stream", filename=name)
        self._root, self._artifact = root, artifact

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises OpsError before the answer has begun."""
        opening = asyncio.ensure_future(asyncio.to_thread(_opened, self._root, self._artifact))
        try:
            file, is_png = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise
        try:
            self.path, self.stat_result = f"/dev/fd/{file}", os.fstat(file)
            self.set_stat_headers(self.stat_result)
            if is_png:
                self._show_as_png()
            await super().__call__(scope, receive, send)
        finally:
            os.close(file)

    def _show_as_png(self) -> None:
        """In place of saving it. Of all that a training may write, a PNG alone runs nothing, whatever is in it."""
        self.headers["Content-Type"] = "image/png"
        self.headers["Content-Disposition"] = self.headers["Content-Disposition"].replace("attachment", "inline", 1)


def safe_name(name: str) -> str:
    """A plain file's wherever it is saved: in a header, on Windows, and to the eye that reads its ending."""
    plain = "".join("_" if char in _NOT_IN_A_NAME or category(char) in _UNSEEN else char for char in name)
    plain = plain.rstrip(". ") or "file"
    return f"_{plain}" if _DEVICE.fullmatch(plain.partition(".")[0].rstrip()) else plain


def _opened(root: Path, artifact: ArtifactView) -> tuple[int, bool]:
    """Its descriptor, and whether it is a PNG: by its name and by how it begins."""
    try:
        file = open_file(root, artifact.path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and root.is_dir():
            raise _gone(artifact, "is no longer in the storage root") from error
        message = f"the storage root cannot be read ({error.strerror}): mount or repair it, then try again"
        raise OpsError(ErrorCode.UNAVAILABLE, message) from error
    if (size_bytes := os.fstat(file).st_size) != artifact.size_bytes:
        os.close(file)
        raise _gone(artifact, f"has {size_bytes} bytes, and {artifact.size_bytes} were saved")
    return file, artifact.name.lower().endswith(".png") and os.pread(file, len(_PNG), 0) == _PNG


def _close(opened: asyncio.Future[tuple[int, bool]]) -> None:
    with suppress(OSError, OpsError):
        os.close(opened.result()[0])


def _gone(artifact: ArtifactView, what: str) -> OpsError:
    message = (
        f"the file of {artifact.name} ({artifact.path}) {what}; restore it from a backup, "
        "or make it again by a fork or a replay of the operation"
    )
    return OpsError(ErrorCode.NOT_FOUND, message)
