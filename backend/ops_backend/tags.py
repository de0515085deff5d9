"""Bodies under a tag that is their hash: a reader who has one already is told so without it (RFC 9110, 13.1.2)."""

import hashlib
import re

from starlette.responses import Response

from ops_contract.wire import Wire

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

    def _is_among(self, tags: str) -> bool:
        """Of several, weak ones (`W/`) included: the comparison is the weak one."""
        return tags == self.tag or tags.strip() == "*" or self.tag in _TAG.findall(tags)
