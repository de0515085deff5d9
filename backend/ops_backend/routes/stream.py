"""What happens to an operation, as server-sent events."""

import re
from typing import Annotated, Any
from uuid import UUID

import anyio
from fastapi import Header, Query
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ops_backend.dependencies import ReaderDep, StreamsDep
from ops_backend.routes.errors import refusals
from ops_backend.routes.routers import api_router
from ops_backend.store.stream import Position
from ops_backend.streams import Stream
from ops_contract.errors import ErrorCode, OpsError

router = api_router("operations", "/operations")

# Well within what the columns hold.
_POSITION = re.compile(r"(\d{1,9})\.(\d{1,9})\.(-?\d{1,18})", re.ASCII)
# To end a response in order, where its client takes anything at all.
LAST_WORD_S = 0.5


class EventStream(StreamingResponse):
    """Until the client goes or the stream ends, also one that waits for its client."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream) -> None:
        # A proxy must not collect them.
        super().__init__(stream.frames(), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with self._stream.scope:
            async for frames in self.body_iterator:
                await send({"type": "http.response.body", "body": frames, "more_body": True})
        with anyio.move_on_after(LAST_WORD_S):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


_MESSAGES = """Every message has the id `<event_seq>.<attempt>.<seq>`, which is the position to go on from.

- `progress`: the operation as in the list; first of all, and when it has changed
- `metrics`: `{attempt, start_step, series: [{name, points: [[step, value], …]}]}`; without series: where it begins
- `event`: as in `…/events`
- `deleted`: the last one
"""
_STREAM: dict[str, Any] = {"description": _MESSAGES, "content": {"text/event-stream": {"schema": {"type": "string"}}}}


@router.get("/{id}/stream", response_class=Response, responses={200: _STREAM, **refusals(404)})
async def stream_operation(
    id: UUID,
    streams: StreamsDep,
    _: ReaderDep,
    last_event_id: Annotated[str | None, Header(description="of the last message; EventSource sends it")] = None,
    after: Annotated[str | None, Query(description="the same; `0.0.0`: from the beginning")] = None,
) -> EventStream:
    """What is new of it, as it comes: from now on, or without a gap from where a client was."""
    position = last_event_id or after
    return EventStream(await streams.open(id, _position(position) if position else None))


def _position(text: str) -> Position:
    if not (found := _POSITION.fullmatch(text)):
        raise OpsError(ErrorCode.INVALID, "after: not the id of a message, like 12.1.340; start without it")
    return Position(*map(int, found.groups()))
