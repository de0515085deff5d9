"""Bodies that routes read and write themselves, and what the OpenAPI document says of them."""

from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ops_contract.jobs import JobSpec
from ops_contract.operations import ForkRequest, ReplayRequest
from ops_contract.wire import Wire

# Beside what FastAPI makes of the same models in answers, where numbers may be strings.
_INPUT = "{model}-Input"
_REFERENCE = f"#/components/schemas/{_INPUT}"


def as_json(body: Wire) -> Response:
    """Written by the model itself: a union's own serializer would turn NaN into null."""
    return Response(body.model_dump_json(), media_type="application/json")


def reads(model: type[BaseModel], example: dict[str, Any], *, required: bool) -> dict[str, Any]:
    """What a route that reads this body, because its bytes count, says as `openapi_extra`."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {
        "requestBody": {"required": required, "content": {"application/json": {"schema": schema, "example": example}}}
    }


def reads_bytes(media_type: str) -> dict[str, Any]:
    schema = {"type": "string", "format": "binary"}
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def install(app: FastAPI) -> None:
    known = app.openapi
    models = [(model, "validation") for model in (JobSpec, ForkRequest, ReplayRequest)]

    def whole() -> dict[str, Any]:
        document = known()
        _, schemas = models_json_schema(models, ref_template=_REFERENCE)  # type: ignore[arg-type]  # a list is invariant
        document["components"]["schemas"] |= {_INPUT.format(model=k): v for k, v in schemas["$defs"].items()}
        return document

    app.openapi = whole  # type: ignore[method-assign]  # as FastAPI documents it
