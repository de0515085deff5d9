"""A job from a file or from flags."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ops_cli.exits import invalid
from ops_contract.jobs import Job, JobSpec
from ops_contract.problems import problems_of, unknown_field

M = TypeVar("M", bound=BaseModel)


# These stay text, whatever they look like; below the named ones too, where what comes after the dot is one name.
TEXTS = ("name", "workload", "workdir")
NAMED_TEXTS = ("env", "labels")


def job_from_text(text: str, source: str, settings: Iterable[str] | None = None) -> JobSpec:
    """YAML or JSON, and `settings` over it. Raises OpsError `invalid` that names the line or the field."""
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise invalid(f"{source} is neither YAML nor JSON: {_where(error)}") from error
    if not isinstance(content, dict):
        raise invalid(f"{source} is no job: it needs at least `workload: NAME`; see `ops workloads`")
    for path, value in _parsed(settings).items():
        _assign(content, path, value, replace=True)
    return checked(JobSpec, content)


def _where(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def job_from_flags(flags: Mapping[str, Any], settings: Iterable[str] | None = None) -> JobSpec:
    return checked(JobSpec, content_from_flags(flags, settings))


def content_from_flags(flags: Mapping[str, Any], settings: Iterable[str] | None) -> dict[str, Any]:
    """`flags` by dotted path, None for one not given; `settings` as typed: `config.k=v`, `execution.k=v`, `name=v`."""
    content: dict[str, Any] = {}
    for path, value in [*flags.items(), *_parsed(settings).items()]:
        if value is not None or path not in flags:
            _assign(content, path, value)
    return content


def _parsed(settings: Iterable[str] | None) -> dict[str, Any]:
    """Values by dotted path."""
    found: dict[str, Any] = {}
    for setting in settings or ():
        path, equals, text = setting.partition("=")
        first = path.split(".")[0]
        if not equals or first not in JobSpec.model_fields:
            hint = f"; {first}: {unknown_field(first, JobSpec.model_fields)}" if equals else ""
            message = f"--set {setting}: write it as PATH=VALUE, such as config.NAME=VALUE or execution.NAME=VALUE"
            raise invalid(message + hint)
        if path in found:
            raise invalid(f"{path} is set twice; give it once")
        is_text = path in TEXTS or (first in NAMED_TEXTS and path != first)
        found[path] = text if is_text else parsed_value(text)
    return found


def parsed_value(text: str) -> Any:
    """JSON where it is JSON, else the text itself: 3, 1e-3, true, null, [1,2], adamw."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def checkpoint_every(text: str) -> dict[str, int] | str:
    """`auto`, or `200steps`, `1epochs`, `30seconds`, singular too."""
    if text == "auto":
        return text
    match = re.fullmatch(r"(\d+) ?(step|epoch|second)s?", text)
    if match is None:
        raise invalid(f"--checkpoint-every {text}: write it like 200steps, 1epoch or 30seconds, or auto")
    return {f"{match[2]}s": int(match[1])}


def labels(pairs: Iterable[str] | None) -> dict[str, str] | None:
    """Of --label; None where it was not given."""
    found = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise invalid(f"--label {pair}: write it as KEY=VALUE")
        found[key] = value
    return found or None


def about(
    name: str | None, label: Iterable[str] | None, priority: int | None, max_retries: int | None
) -> dict[str, Any]:
    """The flags that every job may have."""
    return {"name": name, "labels": labels(label), "priority": priority, "max_retries": max_retries}


def variables(given: Iterable[str], shell: Mapping[str, str]) -> dict[str, str]:
    """`K=V`, or `K` for the shell's value. Raises OpsError `invalid` for one that it does not have."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals and name not in shell:
            raise invalid(f"--env {text}: this shell has no such variable; write it as K=VALUE")
        found[name] = value if equals else shell[name]
    return found


def checked(model: type[M], content: Mapping[str, Any]) -> M:
    """Raises OpsError `invalid` that names every wrong field."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        complaints = [f"{field or 'job'}: {problem}" for field, problem in problems_of(error, model)]
        raise invalid("; ".join(complaints)) from error


def as_yaml(job: Job) -> str:
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """A job flattened, `execution.seed` and so on; text as it is, all else as JSON."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _assign(tree: dict[str, Any], path: str, value: Any, replace: bool = False) -> None:
    """`replace` puts it over what was there."""
    first, dot, rest = path.partition(".")
    *parents, leaf = [first, rest] if dot and first in NAMED_TEXTS else path.split(".")
    for parent in parents:
        inner = tree.get(parent)
        if inner is None:
            inner = tree[parent] = {}
        if not isinstance(inner, dict):
            raise invalid(f"{path} cannot be set in {parent}, which is set as a whole")
        tree = inner
    if leaf in tree and not replace:
        raise invalid(f"{path} is set twice; give it once")
    tree[leaf] = value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for text, and a learning rate is often written so."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)
