"""docker-compose.yml and deploy/Dockerfile, read as far as ours go, so that services can run as plain processes."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def services(variables: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """With `variables` in their places; a required one that is missing is a KeyError."""
    found: dict[str, Any] = yaml.safe_load(_interpolated((ROOT / "docker-compose.yml").read_text(), variables))
    return found["services"]  # type: ignore[no-any-return]


def _interpolated(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, _, rest = match[1].partition(":")
        if rest.startswith("-"):
            return variables.get(name) or rest[1:]
        if not variables.get(name):
            raise KeyError(name)
        return variables[name]

    return re.sub(r"\$\{([^}]*)\}", value, text)


def variables() -> set[str]:
    return set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))


@dataclass
class Image:
    """What a target of deploy/Dockerfile comes to, with those that it is built on."""

    copied: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    user: str = "root"
    command: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)


def images() -> dict[str, Image]:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, Image] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        match instruction, rest.split():
            case "FROM", [base, "AS", name]:
                below = found.get(base, Image())
                found[name] = image = Image(list(below.copied), list(below.directories), list(below.runs), below.user)
            case "COPY", [*sources, _]:
                image.copied += sources
            case "RUN", words:
                image.runs.append(rest)
                if "install" in words and "--directory" in words:
                    image.directories += [word for word in words if re.fullmatch(r"/\w+", word)]
            case "USER", [user]:
                image.user = user
            case "CMD", _:
                image.command = json.loads(rest)
            case "EXPOSE", [port]:
                image.ports.append(int(port))
            case (("ENV" | "ARG" | "WORKDIR"), _):
                pass
            case _:
                raise ValueError(f"deploy/Dockerfile: {line!r} is not understood here")
    return found
