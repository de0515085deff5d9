"""Commands, calls, variables and Python in the documentation: each is one, and each block is run or says why not."""

import re
import shlex
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from helpers.documents import BLOCKS, PAGES, ROOT, Block, commands, prose
from helpers.openapi import openapi_of_this_code
from ops_backend.settings import Settings as BackendSettings
from ops_cli.main import app
from ops_worker.settings import Settings as WorkerSettings

JOURNEYS = {
    "README.md": "readme.sh",
    "docs/quickstart.md": "quickstart.sh",
    "docs/rest.md": "engineer.sh",
    "docs/slurm.md": "lab.sh",
    "docs/tutorial.md": "student.sh",
}


def test_every_block_says_what_it_is_and_commands_are_run_or_say_why_not() -> None:
    for block in BLOCKS:
        assert block.language, f"{block.where} has no language; what a program prints is text"
        if block.language in ("sh", "bash", "console") and not block.not_run:
            page = str(block.page.relative_to(ROOT))
            assert page in JOURNEYS, f"{block.where}: no journey runs it; `<!-- not run: why -->` on the line before"
            assert f"/{page}" in (ROOT / "tests" / "journeys" / JOURNEYS[page]).read_text()


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=lambda block: block.where)
def test_every_command_in_a_block_is_one(block: Block) -> None:
    for program, *arguments in commands(block.text):
        if program.split("/")[-1] == "ops":
            command, path, rest = _command(arguments)
            command.make_context(path, rest, obj=None)  # raises what a user would be told
        if program == "curl":
            method, url = _request(arguments)
            assert _is_call(method, url), f"{method} {url}"
            assert "-d" not in arguments or any("json" in each.lower() for each in arguments), "it has to say JSON"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_calls_in_the_text_exist(page: Path) -> None:
    """They are not complete, but what they name is there."""
    text = prose(page)
    for words in re.findall(r"`ops ([a-z][^`]*)`", text):
        command, _, rest = _command(shlex.split(re.sub(r"[\[\]…]|\.\.\.", " ", words)))
        known = {option for p in getattr(command, "params", ()) for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        given = rest[: rest.index("--")] if "--" in rest else rest
        options = {word.split("=")[0] for word in given if word.startswith("-") and len(word) > 1}
        assert options <= known | {"-h"}, f"`ops {words}`"
    for method, path in re.findall(r"`(GET|POST|PUT|HEAD|DELETE) (/[^`\s]+)`", text):
        assert _is_call(method, path) or _is_call(method, f"/api/v1{path}"), f"{method} {path}"


def test_every_variable_in_the_documentation_is_one_that_the_code_reads() -> None:
    packages = ("cli", "sdk", "worker", "backend", "contract")
    code = "".join(path.read_text() for package in packages for path in (ROOT / package).rglob("*.py"))
    fields = {f"OPS_{name.upper()}" for model in (BackendSettings, WorkerSettings) for name in model.model_fields}
    known = fields | set(re.findall(r"OPS_[A-Z]\w*", code))
    for page in PAGES:
        named = set(re.findall(r"\bOPS_[A-Z][A-Z_]*[A-Z]", page.read_text()))
        assert {name for name in named if not name.startswith("OPS_SECRET_")} <= known, page.name


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.where)
def test_every_block_of_python_compiles(block: Block) -> None:
    compile(textwrap.dedent(block.text), block.where, "exec")


def test_the_class_on_the_page_is_the_one_that_init_writes_and_that_is_checked() -> None:
    written = (ROOT / "cli/ops_cli/templates/workload/workload.py").read_text()
    [shown] = [block for block in BLOCKS if block.text.startswith("class Mine(Workload[Config])")]

    assert shown.text in written


@cache
def _ops() -> Any:
    return typer.main.get_command(app)


def _command(words: list[str]) -> tuple[Any, str, list[str]]:
    """What typer makes of the first words, how it is called, and the other words."""
    command, path = _ops(), "ops"
    while hasattr(command, "commands") and words and not words[0].startswith("-") and words[0].islower():
        assert words[0] in command.commands, f"there is no `{path} {words[0]}`"
        command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
    return command, path, words


def _request(arguments: list[str]) -> tuple[str, str]:
    """Method and path of a curl."""
    [url] = [word for word in arguments if re.match(r"https?://|\$API|\$OPS_API_URL", word)]
    method = "PUT" if "-T" in arguments else "POST" if "-d" in arguments else "GET"
    if "-X" in arguments:
        method = arguments[arguments.index("-X") + 1]
    path = re.sub(r"^(https?://[^/]+|\$OPS_API_URL)", "", url.replace("$API", "/api/v1")).partition("?")[0]
    return method, path


def _is_call(method: str, path: str) -> bool:
    if path in ("/openapi.json", "/docs"):
        return True
    path = re.sub(r"\$\w+|\bID\b|\bSHA256\b|\{\w+\}|[0-9a-f]{8}-[0-9a-f-]{27}", "{}", path.partition("?")[0])
    return any(
        re.sub(r"\{\w+\}", "{}", template) == path and method.lower() in methods
        for template, methods in openapi_of_this_code().document["paths"].items()
    )
