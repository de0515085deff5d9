"""Every metric of an operation as one file, made when it is asked for."""

import asyncio
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Annotated, BinaryIO, Literal
from uuid import UUID

from fastapi import Query, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ops_backend.dependencies import ExportTurnsDep, PatientSessionsDep, ReaderDep
from ops_backend.log_files import points
from ops_backend.routes.errors import refusals
from ops_backend.routes.routers import api_router
from ops_backend.store.log_files import read
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.jobs import Logger

router = api_router("operations", "/operations")

WAIT_S = 20.0  # less than a client waits for an answer
_READ_BYTES = 256 * 1024
_MEDIA_TYPES = {Logger.CSV: "text/csv; charset=utf-8", Logger.TENSORBOARD: "application/octet-stream"}
_FILE = {
    "description": "metrics.csv, or an event file, under the name that it has in the operation's logs/",
    "content": {kind.partition(";")[0]: {"schema": {"type": "string"}} for kind in _MEDIA_TYPES.values()},
}


@router.get("/{id}/export", response_class=Response, responses={200: _FILE, **refusals(404)})
async def export_operation(
    id: UUID,
    sessions: PatientSessionsDep,
    turns: ExportTurnsDep,
    _: ReaderDep,
    format: Annotated[Literal["csv", "tensorboard"], Query(description="as of `execution.logger`")] = "csv",
) -> Response:
    """Every metric along the lineage, every bit kept; of an operation that has not ended what there is so far.

    A few are made at a time: 503 when it does not come to this one for a while.
    """
    logger: Literal[Logger.CSV, Logger.TENSORBOARD] = Logger.CSV if format == "csv" else Logger.TENSORBOARD
    await _take(turns)
    try:
        async with sessions.begin() as session:
            recorded = await read(session, id)
        name, write = points(recorded, logger)
        file = await asyncio.to_thread(_written, write)
    finally:
        turns.release()
    return FileOnce(file, name, _MEDIA_TYPES[logger])


class FileOnce(StreamingResponse):
    """Sends a file without a name and closes it, whatever becomes of the client; then it is gone."""

    def __init__(self, file: BinaryIO, name: str, media_type: str) -> None:
        headers = {
            "Content-Length": str(file.seek(0, 2)),
            "Content-Disposition": f'attachment; filename="{name}"',
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
        }
        file.seek(0)
        super().__init__(iter(partial(file.read, _READ_BYTES), b""), headers=headers, media_type=media_type)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


async def _take(turns: asyncio.Semaphore) -> None:
    """Raises OpsError when none comes."""
    try:
        async with asyncio.timeout(WAIT_S):
            await turns.acquire()
    except TimeoutError:
        message = "other exports are being made; try again when they are done"
        raise OpsError(ErrorCode.UNAVAILABLE, message) from None


def _written(write: Callable[[BinaryIO], None]) -> BinaryIO:
    """A file without a name: it is gone with its descriptor, also when this process is killed."""
    try:
        file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            write(file)
            file.flush()
        except BaseException:
            file.close()
            raise
    except OSError as error:
        message = f"the export cannot be written to the API's {tempfile.gettempdir()} ({error.strerror}): "
        raise OpsError(ErrorCode.UNAVAILABLE, f"{message}make room there, or set TMPDIR, then try again") from error
    return file
