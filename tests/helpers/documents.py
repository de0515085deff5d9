"""The pages of the documentation, and the blocks of code in them.

As a program it writes the blocks of a page that are to be run as files: `documents.py PAGE DIRECTORY`.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
_HEREDOC = re.compile(r"<<'?(\w+)'?\n.*?^\1$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """`not_run` says why, where the page has the comment `<!-- not run: … -->` on the line before."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Those between fences, in their order."""
    lines = page.read_text().splitlines()
    begin: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begin is None:
            begin = number
            continue
        marked = _NOT_RUN.fullmatch(lines[begin - 1]) if begin else None
        text = "\n".join(lines[begin + 1 : number]) + "\n"
        yield Block(page, begin + 1, lines[begin][3:], text, marked[1] if marked else None)
        begin = None


def prose(page: Path) -> str:
    """What is between the blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Program and arguments of each command in a piece of shell, those of pipes and `$(…)` too."""
    text = _HEREDOC.sub("", text).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if token and set(token) <= set("();<>|&"):
                yield from _named(words)
                words = []
            else:
                words.append(token)


def _named(words: list[str]) -> Iterator[list[str]]:
    while words and re.match(r"\w+=", words[0]):  # set for the command, or what `$(…)` is assigned to
        words = words[1:]
    if words:
        yield words


BLOCKS = [block for page in PAGES for block in blocks(page)]

if __name__ == "__main__":
    page, directory = map(Path, sys.argv[1:])
    for number, block in enumerate((b for b in blocks(page) if b.language in ("sh", "python") and not b.not_run), 1):
        (directory / f"{number}.{block.language}").write_text(block.text)
