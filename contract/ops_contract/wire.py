"""How values travel: one base model, exact float64 arrays, non-finite numbers as strings."""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, StringConstraints
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

API_PREFIX = "/api/v1"
PIPE_VERSION = 7

# Of an answer with a part of an operation's output: where it begins, where the next one does, all there is so far, and
# whether it ends what an ended operation wrote.
LOG_OFFSET, LOG_NEXT, LOG_END, LOG_COMPLETE = (f"Relight-Log-{word}" for word in ("Offset", "Next", "End", "Complete"))

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Text = Annotated[str, StringConstraints(max_length=20_000, pattern=r"^[^\x00]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Step = Annotated[int, Field(ge=0, lt=2**63)]


class Wire(BaseModel):
    """Unknown fields are errors; NaN and the infinities are the strings "NaN", "Infinity", "-Infinity"."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", frozen=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Of what is written, the strings too: pydantic itself says `number` of every float."""
        schema = handler(core)
        if handler.mode == "serialization":
            properties = handler.resolve_ref_schema(schema).get("properties", {})
            for name, field in cls.model_fields.items():
                if name in properties and all(getattr(m, "allow_inf_nan", True) is not False for m in field.metadata):
                    properties[name] = _or_non_finite(properties[name])
        return schema


def _or_non_finite(schema: Any) -> Any:
    """The same JSON Schema with the three strings wherever it has a number."""
    if isinstance(schema, list):
        return [_or_non_finite(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "number":
        return {"anyOf": [schema, {"enum": ["NaN", "Infinity", "-Infinity"], "type": "string"}]}
    inner = ("anyOf", "items", "prefixItems", "additionalProperties")
    return schema | {key: _or_non_finite(schema[key]) for key in inner if key in schema}


def pack_float64(values: Sequence[float]) -> str:
    """Base64 of the little-endian float64 bytes: every bit travels, those of NaN included."""
    return base64.b64encode(struct.pack(f"<{len(values)}d", *values)).decode("ascii")


def unpack_float64(packed: str) -> list[float]:
    """The inverse of `pack_float64`. Raises ValueError when the text is not base64 of whole float64s."""
    raw = base64.b64decode(packed, validate=True)
    if len(raw) % 8:
        raise ValueError(f"{len(raw)} bytes are not a whole number of float64 values")
    return list(struct.unpack(f"<{len(raw) // 8}d", raw))


def canonical(value: Any) -> str:
    """JSON that equal values share: sorted names, and 1.0 written as 1, as in RFC 8785.

    A database or a browser that the job went through may have made one of the other.
    """
    return json.dumps(_numbers_as_one(value), sort_keys=True, separators=(",", ":"))


def _numbers_as_one(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _numbers_as_one(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers_as_one(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
