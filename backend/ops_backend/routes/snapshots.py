"""Projects as they were submitted, by the SHA-256 of their archive."""

import hashlib
from typing import Annotated

from fastapi import Path, Request, Response

from ops_backend.dependencies import AuditDep, CallerDep, SessionDep, SessionsDep, UserDep
from ops_backend.routes.errors import refusals
from ops_backend.routes.raw_bodies import reads_bytes
from ops_backend.routes.routers import api_router
from ops_backend.store import snapshots
from ops_contract.audit import Action
from ops_contract.errors import ErrorCode, OpsError

router = api_router("snapshots", "/snapshots")

Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="of the archive, in hexadecimal")]
ARCHIVE = "application/octet-stream"


@router.put(
    "/{sha256}",
    status_code=201,
    response_class=Response,
    responses={200: {"description": "it was here already"}},
    openapi_extra=reads_bytes(ARCHIVE),
)
async def put_snapshot(
    sha256: Digest, request: Request, sessions: SessionsDep, _: UserDep, audit: AuditDep
) -> Response:
    """Upload an archive. It stays while an operation refers to it, and for a day after it was last asked for."""
    archive = await request.body()
    if hashlib.sha256(archive).hexdigest() != sha256:
        raise OpsError(ErrorCode.INVALID, "sha256: the body has another hash; it was changed on its way, send it again")
    async with sessions.begin() as session:
        if is_new := await snapshots.keep(session, sha256, archive):
            await audit.note(session, Action.UPLOAD, sha256, size_bytes=len(archive))
    return Response(status_code=201 if is_new else 200)


@router.head("/{sha256}", responses=refusals(404))
async def has_snapshot(sha256: Digest, session: SessionDep, _: UserDep) -> None:
    """Whether it is here. If so it stays for a day more, and need not be sent."""
    if not await snapshots.has(session, sha256):
        raise _unknown(sha256)


@router.get(
    "/{sha256}",
    response_class=Response,
    responses={200: {"content": {ARCHIVE: {}}, "description": "a tar file"}, **refusals(404)},
)
async def get_snapshot(sha256: Digest, session: SessionDep, _: CallerDep) -> Response:
    """The archive, as it was uploaded: for users and for the workers that run it."""
    archive = await snapshots.archive(session, sha256)
    if archive is None:
        raise _unknown(sha256)
    return Response(archive, media_type=ARCHIVE)


def _unknown(sha256: str) -> OpsError:
    return OpsError(ErrorCode.NOT_FOUND, f"no snapshot {sha256} is here; upload it (PUT /snapshots/SHA256)")
