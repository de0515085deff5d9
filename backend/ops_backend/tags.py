"""Bodies under a tag that is their hash: a reader who has one already is told so without it (RFC 9110, 13.1.2)."""

import hashlib
import re
from functools import cached_property
from typing import Annotated, Any, Final

from fastapi import Header
from starlette.responses import Response
from starlette.types import Message

from ops_contract.http_gate import with_headers
from ops_contract.wire import Wire

# What a route with such answers asks for, and says of itself.
IfNoneMatch = Annotated[str | None, Header(description="an `ETag`; 304 while nothing has changed")]
UNCHANGED: Final[dict[int | str, dict[str, Any]]] = {304: {"description": "unchanged"}}

_TAG = re.compile(r'"[^"]*"')


class Tagged:
    """One body and its two answers, for any number of readers. `tag` is quoted, as it stands in `ETag`."""

    def __init__(self, body: Wire) -> None:
        content = body.model_dump_json().encode()
        self.tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {"ETag": self.tag, "Cache-Control": "no-cache"}
        self._whole = Response(content, headers=headers, media_type="application/json")
        self._unchanged = Response(status_code=304, headers=headers)

    def answer(self, if_none_match: str | None) -> Response:
        has_it = if_none_match is not None and self._is_among(if_none_match)
        return self._unchanged if has_it else self._whole

    def messages(self, if_none_match: str | None) -> tuple[Message, Message]:
        """The answer as it leaves the gate: its start, with the status, and its body."""
        return self._messages[self.answer(if_none_match)]

    @cached_property
    def _messages(self) -> dict[Response, tuple[Message, Message]]:
        return {answer: _messages(answer) for answer in (self._whole, self._unchanged)}

    def _is_among(self, tags: str) -> bool:
        """Of several, weak ones (`W/`) included: the comparison is the weak one."""
        return tags == self.tag or tags.strip() == "*" or self.tag in _TAG.findall(tags)


def _messages(answer: Response) -> tuple[Message, Message]:
    headers = with_headers(answer.raw_headers)
    start = {"type": "http.response.start", "status": answer.status_code, "headers": headers}
    return start, {"type": "http.response.body", "body": answer.body}
