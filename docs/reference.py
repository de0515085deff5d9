"""The reference, made from the code that it describes: each public function is what stands in one place of a page.

conf.py puts it where the page says `<!-- made from code: NAME -->`.
"""

import json
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import typer.main

from ops_backend.app import create_app
from ops_backend.settings import Settings
from ops_cli.exits import ExitCode
from ops_cli.main import app as ops
from ops_contract.jobs import JobSpec
from ops_contract.lifecycle import TRANSITIONS

Json = dict[str, Any]

# What FastAPI says of an answer of which we say nothing.
_SAYS_NOTHING = {"Successful Response", "Validation Error", *(status.phrase for status in HTTPStatus)}

_EXITS = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "it failed, or what was compared differs",
    ExitCode.USAGE: "a wrong option, or a job that is refused; nothing was changed",
    ExitCode.NOT_FOUND: "there is no such operation, checkpoint or worker",
    ExitCode.CONFLICT: "not in this state; the message says which it is in",
    ExitCode.UNREACHABLE: "no server answers, or its database is away; try again",
    ExitCode.DETACHED: "ctrl-C: what was watched goes on",
}
# Of every command that speaks to a server; the page says so once.
_COMMON = ("--url", "--token")


def transitions() -> str:
    """The state machine, row by row."""
    rows = [
        (_code(t.source or "–"), _code(t.event), _code(t.target), t.guard, "yes" if t.charged else "")
        for t in TRANSITIONS
    ]
    return _table(("from", "event", "to", "if, in the same statement", "counts as a failure"), rows)


def cli() -> str:
    """Every command, in the order and the words of its own `--help`."""
    return "\n\n".join(_command(path, command) for path, command in commands())


def exit_codes() -> str:
    return _table(("code", "what it says"), [(str(code.value), _EXITS[code]) for code in ExitCode])


def commands() -> Iterator[tuple[str, Any]]:
    """`ops up`, `ops checkpoints list`, …, and what typer makes of each."""

    def below(path: str, command: Any) -> Iterator[tuple[str, Any]]:
        group = hasattr(command, "commands")
        if not group or command.invoke_without_command:
            yield path, command
        for name, child in command.commands.items() if group else ():
            if not child.hidden:
                yield from below(f"{path} {name}", child)

    yield from below("ops", typer.main.get_command(ops))


def calls() -> str:
    """Every call of the API, by what it is about."""
    document = openapi()
    texts: dict[str, list[str]] = {tag["name"]: [] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            texts[call["tags"][-1]].append(_call(f"{method.upper()} {path}", call, document["components"]["schemas"]))
    about = {tag["name"]: tag["description"] for tag in document["tags"]}
    return "\n\n".join(f"## {tag.capitalize()}\n\n{about[tag]}\n\n" + "\n\n".join(texts[tag]) for tag in texts)


def schemas() -> str:
    """What bodies are made of."""
    return _objects(openapi()["components"]["schemas"], "###")


def job() -> str:
    """A job file, field by field."""
    schema = JobSpec.model_json_schema()
    inner = schema.pop("$defs")
    parts = ("Execution", "CheckpointEvery", "Resources", "Code", "Grid", "IsoFlop", "SizeRange", "LearningRateRule")
    return _objects({"The job": schema} | {name: inner[name] for name in parts}, "##", inner)


def openapi() -> Json:
    settings = Settings(database_url="postgresql://x/y", api_token="x" * 16, storage_root=Path("/"))
    return create_app(settings).openapi()


def _command(path: str, command: Any) -> str:
    context = command.make_context(path, [], resilient_parsing=True)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    records = [p.get_help_record(context) for p in command.params if not set(_COMMON) & set(p.opts)]
    rows = [(_code(record[0]), _prose(record[1])) for record in records if record]
    parts = [f"## {path}", f"```text\n{usage}\n```", _prose(command.help), rows and _table(("", ""), rows)]
    return "\n\n".join(filter(None, parts))


def _call(heading: str, call: Json, known: dict[str, Json]) -> str:
    parameters = [
        (_code(p["name"]), p["in"], _type(p["schema"], known), p.get("description", ""))
        for p in call.get("parameters", [])
    ]
    body = call.get("requestBody", {}).get("content", {})
    answers: dict[tuple[str, str], list[str]] = {}
    for status, answer in sorted(call["responses"].items()):
        answers.setdefault(_answer(answer, known), []).append(status)
    parts = [
        f"### {heading}",
        call.get("description", ""),
        parameters and _table(("parameter", "in", "type", ""), parameters),
        body and f"Body: {_bodies(body, known)}",
        *(f"```json\n{json.dumps(media['example'])}\n```" for media in body.values() if "example" in media),
        _table(("answer", "body", ""), [(", ".join(codes), *what) for what, codes in answers.items()]),
    ]
    return "\n\n".join(filter(None, parts))


def _answer(answer: Json, known: dict[str, Json]) -> tuple[str, str]:
    said = answer.get("description", "")
    said = "" if said in _SAYS_NOTHING else said
    return _bodies(answer.get("content", {}), known), said.partition("\n")[0]


def _bodies(content: Json, known: dict[str, Json]) -> str:
    """By schema where it is JSON, else by media type."""
    return ", ".join(
        _type(media["schema"], known) if kind == "application/json" and media.get("schema") else _code(kind)
        for kind, media in content.items()
    )


def _objects(schemas: dict[str, Json], level: str, others: dict[str, Json] | None = None) -> str:
    known = schemas | (others or {})
    parts = []
    for name, schema in schemas.items():
        if "enum" in schema:
            continue  # its values stand where it is used
        required = schema.get("required", ())
        rows = [
            (_code(field), _type(about, known), _default(about, field in required), about.get("description", ""))
            for field, about in schema.get("properties", {}).items()
        ]
        table = _table(("field", "type", "default", ""), rows) if rows else ""
        parts += [f"{level} {name}", _prose(schema.get("description", "")), table]
    return "\n\n".join(filter(None, parts))


def _type(schema: Json, known: dict[str, Json]) -> str:
    """As few words as tell a reader what to write."""
    match schema:
        case {"$ref": str(ref)}:
            name = ref.rpartition("/")[2]
            values = known.get(name, {}).get("enum")
            return _values(values) if values else f"[{name}](#{name.lower()})"
        case {"anyOf": list(parts)} | {"oneOf": list(parts)}:
            return " or ".join(dict.fromkeys(_type(part, known) for part in parts))
        case {"enum": list(values)}:
            return _values(values)
        case {"const": value}:
            return _code(value)
        case {"type": "array", "items": dict(items)}:
            return f"list of {_type(items, known)}"
        case {"type": "array", "prefixItems": list(items)}:
            return f"list: {', '.join(_type(item, known) for item in items)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"object of {_type(values, known)}"
        case {"type": str(name)}:
            return " ".join([name, schema.get("format", ""), _bounds(schema)]).strip()
    return "any"


def _bounds(schema: Json) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(schema[key])}" for key, sign in signs.items() if key in schema]
    return ", ".join(bounds)


def _number(value: float) -> str:
    return "2⁶³" if value == 2**63 else f"{value:,}".removesuffix(".0")


def _values(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(_code, values)))


def _default(schema: Json, required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "" if isinstance(default, dict | list) or "default" not in schema else _code(json.dumps(default))


def _code(value: object) -> str:
    return f"`{value}`"


def _prose(text: str | None) -> str:
    """Help and docstrings are Markdown, but for angles and stars, and for \\b before lines that stay lines."""
    plain, *kept = (text or "").split("\b\n")
    blocks = (part.partition("\n\n") for part in kept)
    return _escaped(plain) + "".join(f"```sh\n{lines}\n```\n{_escaped(rest)}" for lines, _, rest in blocks)


def _escaped(text: str) -> str:
    return text.replace("<", "\\<").replace("*", "\\*")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
