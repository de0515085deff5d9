"""A job from a file or from flags."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from ops_contract.errors import ErrorCode, OpsError
from ops_contract.jobs import JobSpec


def job_from_text(text: str, source: str) -> JobSpec:
    """YAML or JSON. Raises OpsError `invalid` that names the line or the field."""
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise OpsError(ErrorCode.INVALID, f"{source} is neither YAML nor JSON: {error}") from error
    if not isinstance(content, dict):
        raise OpsError(
            ErrorCode.INVALID, f"{source} is no job: it needs at least `workload: NAME`; see `ops workloads`"
        )
    return checked_job(content)


def job_from_flags(flags: Mapping[str, Any], settings: Iterable[str]) -> JobSpec:
    return checked_job(content_from_flags(flags, settings))


def content_from_flags(flags: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`flags` by dotted path, None for one not given; `settings` as typed: `config.k=v` or `execution.k=v`."""
    content: dict[str, Any] = {}
    for path, value in flags.items():
        if value is not None:
            _assign(content, path, value)
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals or path.split(".")[0] not in ("config", "execution") or "." not in path:
            raise OpsError(ErrorCode.INVALID, f"--set {setting}: write it as config.NAME=VALUE or execution.NAME=VALUE")
        _assign(content, path, parsed_value(value))
    return content


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
        raise OpsError(
            ErrorCode.INVALID, f"--checkpoint-every {text}: write it like 200steps, 1epoch or 30seconds, or auto"
        )
    return {f"{match[2]}s": int(match[1])}


def labels(pairs: Iterable[str], option: str = "--label") -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise OpsError(ErrorCode.INVALID, f"{option} {pair}: write it as KEY=VALUE")
        found[key] = value
    return found


def variables(given: Iterable[str], shell: Mapping[str, str]) -> dict[str, str]:
    """`K=V`, or `K` for the shell's value. Raises OpsError `invalid` for one that it does not have."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals and name not in shell:
            raise OpsError(ErrorCode.INVALID, f"--env {text}: this shell has no such variable; write it as K=VALUE")
        found[name] = value if equals else shell[name]
    return found


def checked_job(content: Mapping[str, Any]) -> JobSpec:
    try:
        return JobSpec.model_validate(content)
    except ValidationError as error:
        complaints = [f"{'.'.join(map(str, e['loc'])) or 'job'}: {e['msg']}" for e in error.errors()]
        raise OpsError(ErrorCode.INVALID, "; ".join(complaints)) from error


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise OpsError(ErrorCode.INVALID, f"{path} is set twice, the first time as a whole")
    if leaf in tree:
        raise OpsError(ErrorCode.INVALID, f"{path} is set twice; give it once")
    tree[leaf] = value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for text, and a learning rate is often written so."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)
