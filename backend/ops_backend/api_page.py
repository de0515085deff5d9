"""`/docs`: the OpenAPI document for people, as one page without scripts, with nothing from another host."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from ops_backend.pages import release

_PAGE = """<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <meta name="color-scheme" content="light dark">
    <title>{title}</title>
    <link rel="icon" href="/dashboard/{release}/icon.svg" type="image/svg+xml">
    <link rel="stylesheet" href="/dashboard/{release}/base.css">
  </head>
  <body>
    <main>
      <h1>{title}</h1>
      <p>For programs: <a href="/openapi.json"><code>/openapi.json</code></a>. Calls want
      <code>Authorization: Bearer TOKEN</code> unless they say that they are open to all.</p>
{content}
    </main>
  </body>
</html>
"""


def api_page(document: dict[str, Any]) -> str:
    calls = [(method, path, call) for path, methods in document["paths"].items() for method, call in methods.items()]
    lines: list[str] = []
    for tag in document["tags"]:
        lines += [f"<h2>{escape(tag['name'])}</h2>", f"<p>{escape(tag['description'])}</p>"]
        for method, path, call in calls:
            if call["tags"][0] == tag["name"]:
                lines += _call(method, path, call)
    lines.append("<h2>Schemas</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += [f'<details id="{escape(name)}"><summary>{escape(name)}</summary>', _json(schema), "</details>"]
    title = f"{document['info']['title']} API {document['info']['version']}"
    return _PAGE.format(title=escape(title), release=release(), content="\n".join(lines))


def _call(method: str, path: str, call: dict[str, Any]) -> Iterator[str]:
    yield f"<details><summary><code>{method.upper()} {escape(path)}</code></summary>"
    yield from (f"<p>{escape(part)}</p>" for part in call.get("description", "").split("\n\n"))
    if "security" not in call:
        yield "<p>Open to all.</p>"
    if parameters := call.get("parameters"):
        yield "<ul>"
        for each in parameters:
            need = ", required" if each.get("required") else ""
            what = f"{each['in']}{need}: {each.get('description', '')}"
            yield f"<li><code>{escape(each['name'])}</code> ({escape(what.rstrip(': '))})</li>"
        yield "</ul>"
    for kind, content in call.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Body, {escape(kind)}: {_schema(content.get('schema', {}))}</p>"
    yield "<ul>"
    for status, answer in call["responses"].items():
        bodies = ", ".join(_schema(body.get("schema", {})) for body in answer.get("content", {}).values())
        yield f"<li>{status} {escape(answer['description'])} {bodies}</li>"
    yield "</ul></details>"


def _schema(schema: dict[str, Any]) -> str:
    """Links to those that have a name."""
    names = [part.rpartition("/")[2] for part in _references(schema)]
    return " or ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in names)


def _references(schema: dict[str, Any]) -> list[str]:
    return [each["$ref"] for each in (schema, *schema.get("anyOf", ())) if "$ref" in each]


def _json(schema: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(schema, indent=2, ensure_ascii=False))}</pre>"
