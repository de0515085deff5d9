"""Every answer of the API against the OpenAPI document that it serves: status, content type, body."""

import re
from collections.abc import Callable
from datetime import datetime
from functools import cache, cached_property
from http import HTTPMethod
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from jsonschema import Draft202012Validator, FormatChecker

from ops_backend.app import create_app
from ops_backend.settings import Settings
from ops_contract.errors import ErrorBody

_formats = FormatChecker(formats=())
_formats.checks("uuid", raises=ValueError)(lambda value: not isinstance(value, str) or bool(UUID(value)))
_formats.checks("date-time", raises=ValueError)(
    lambda value: not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None
)
_BY_FASTAPI = ("/openapi.json", "/docs", "/redoc")


class NotDocumented(AssertionError):
    """An answer that the API's own description does not allow."""


@cache
def openapi_of_this_code() -> "OpenAPI":
    """For apps in the process of the tests: they are all the same, and describing one takes a while."""
    settings = Settings(database_url="postgresql://x/y", api_token="x" * 16, storage_root=Path("/"))
    return OpenAPI(create_app(settings).openapi)


class OpenAPI:
    """Checks answers, as a hook of a client: the call that got a wrong one raises NotDocumented.

    Only bodies in JSON are read; of files and streams status and type are checked.
    """

    def __init__(self, document: Callable[[], dict[str, Any]]) -> None:
        self._fetch = document
        self._validators: dict[tuple[str, str, str, str], Draft202012Validator] = {}
        self._seen: set[tuple[Any, bytes]] = set()  # polls mostly say the same again

    def watch(self, client: httpx.Client) -> None:
        client.event_hooks["response"].append(self._check)

    def watch_async(self, client: httpx.AsyncClient) -> None:
        client.event_hooks["response"].append(self._check_async)

    def check(self, method: str, path: str, status: int, content_type: str | None, body: bytes) -> None:
        """Raises NotDocumented."""
        said = f"{method} {path} answered {status}, {content_type}"
        if path in _BY_FASTAPI:
            return
        found = self._operation(method, path)
        if found is None:
            if status not in (404, 405):
                raise NotDocumented(f"{said}: no such call is documented")
            ErrorBody.model_validate_json(body or b"{}")
            return
        template, operation = found
        answer = operation["responses"].get(str(status))
        if answer is None:
            raise NotDocumented(f"{said}: documented are {', '.join(operation['responses'])}")
        types = answer.get("content", {})
        kind = content_type and content_type.partition(";")[0]
        if kind not in types and (kind or (types and method != HTTPMethod.HEAD)):
            raise NotDocumented(f"{said}: documented are {', '.join(types) or 'no body'}")
        if kind == "application/json" and method != HTTPMethod.HEAD:
            self._check_body((template, method, str(status), kind), types[kind].get("schema", {}), body, said)

    def _check_body(self, key: tuple[str, str, str, str], schema: dict[str, Any], body: bytes, said: str) -> None:
        if (key, body) in self._seen:
            return
        if key not in self._validators:
            whole = {**schema, "components": self.document["components"]}
            self._validators[key] = Draft202012Validator(whole, format_checker=_formats)
        for error in self._validators[key].iter_errors(httpx.Response(200, content=body).json()):
            raise NotDocumented(f"{said}: {error.json_path}: {error.message}")
        self._seen.add((key, body))

    def _operation(self, method: str, path: str) -> tuple[str, dict[str, Any]] | None:
        for pattern, template, methods in self._paths:
            if pattern.fullmatch(path):
                name = "get" if method == HTTPMethod.HEAD and "head" not in methods else method.lower()
                return (template, methods[name]) if name in methods else None
        return None

    @cached_property
    def document(self) -> dict[str, Any]:
        return self._fetch()

    @cached_property
    def _paths(self) -> list[tuple[re.Pattern[str], str, dict[str, Any]]]:
        """Those without parameters first."""
        paths = sorted(self.document["paths"].items(), key=lambda item: item[0].count("{"))
        return [(re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), path, methods) for path, methods in paths]

    def _check(self, response: httpx.Response) -> None:
        if _is_json(response):
            response.read()
        self._check_read(response)

    async def _check_async(self, response: httpx.Response) -> None:
        if _is_json(response):
            await response.aread()
        self._check_read(response)

    def _check_read(self, response: httpx.Response) -> None:
        body = response.content if _is_json(response) else b""
        request, content_type = response.request, response.headers.get("content-type")
        self.check(request.method, request.url.path, response.status_code, content_type, body)


def _is_json(response: httpx.Response) -> bool:
    return str(response.headers.get("content-type", "")).startswith("application/json")
