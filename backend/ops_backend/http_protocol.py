"""HTTP as uvicorn speaks it with httptools, which by themselves keep a head or a trailer however long it gets."""

from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ops_contract.errors import ErrorCode, OpsError
from ops_contract.http_gate import HEADERS, MAX_HEAD_BYTES


class BoundedHttp(HttpToolsProtocol):
    """Refuses heads that are too large, and what is no HTTP, in the one shape of errors, and closes."""

    # Since the parser had something to say: it tells of a header when it has all of it.
    _silent_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._silent_bytes += len(data)
        super().data_received(data)
        if self._silent_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        self._silent_bytes = 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            return self._refuse_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(OpsError(ErrorCode.INVALID, msg), HTTPStatus.BAD_REQUEST)

    def _refuse_head(self) -> None:
        message = f"address and headers of a request have at most {MAX_HEAD_BYTES} B together"
        error = OpsError(ErrorCode.HEAD_TOO_LARGE, message, max_bytes=MAX_HEAD_BYTES)
        self._refuse(error, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _refuse(self, error: OpsError, status: HTTPStatus) -> None:
        if self.transport.is_closing():
            return
        body = error.body().model_dump_json().encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        lines = [b"%s: %s" % header for header in (*headers, (b"connection", b"close"), *HEADERS)]
        self.transport.write(b"\r\n".join([f"HTTP/1.1 {status} {status.phrase}".encode(), *lines, b"", b""]) + body)
        self.transport.close()
