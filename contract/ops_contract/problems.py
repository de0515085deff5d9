"""What is wrong with what somebody wrote, field by field, in words."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ops_contract.errors import without_prefix
from ops_contract.wire import Wire

# Of pydantic's types of error, those whose own words speak of Python.
_PLAIN = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be an object: names with values",
    "model_type": "must be an object: names with values",
    "model_attributes_type": "must be an object: names with values",
    "uuid_type": "must be a whole id, 36 characters, as `ops list --json` has it",
    "uuid_parsing": "must be a whole id, 36 characters, as `ops list --json` has it",
}


class Problem(Wire):
    """`field` is a path within the job."""

    field: str
    problem: str


def problems_of(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    """(field, problem) for each; of an unknown field the nearest known one is said. `prefix` has its dot."""
    found = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        path = each["loc"]
        known = list(_fields_at(model, path[:-1])) if each["type"] == "extra_forbidden" else []
        problem = unknown_field(str(path[-1]), known) if known else in_words(each)
        found.append(((prefix + ".".join(map(str, path))).removesuffix("."), problem))
    return found


def in_words(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors."""
    return _PLAIN.get(error["type"]) or without_prefix(error["msg"])


def offer(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, else all of them."""
    known = list(known)
    if near := get_close_matches(word, known, 1):
        return f"did you mean {near[0]}?"
    return f"there are {', '.join(known)}" if known else "there are none yet"


def unknown_field(name: str, known: Iterable[str]) -> str:
    """`known` may name fields further down, with dots."""
    known = list(known)
    last = {path.rpartition(".")[2]: path for path in reversed(known)}
    near = get_close_matches(name, last, 1)
    if near:
        return f"no such field; did you mean {last[near[0]]}?"
    offered = ", ".join(path for path in known if "." not in path)
    return f"no such field; there are {offered}" if offered else "no such field; there are none here"


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> Iterator[str]:
    """The names there, then those of the fields in them: `max_epochs` beside `execution` is meant in it."""
    for step in path:
        field = model.model_fields.get(str(step))
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            return
        model = inner
    yield from model.model_fields
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        yield from (f"{name}.{each}" for each in (inner.model_fields if inner else ()))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
