"""What an operation prints."""

import codecs
import math
import re
import sys
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from ops_cli.connect import OperationId, with_client
from ops_cli.watch import POLL_S, Away, detachable

if TYPE_CHECKING:
    from relight.client import Client

TAIL_BYTES = 2**20

# All that is no text but tab, newline, return, backspace and colours.
_HARMFUL = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
_UNFINISHED = re.compile(r"\x1b(\[[0-9;]{0,30})?\Z")
_NO_COLOURS = b"\x1b[0m"


def register(app: typer.Typer) -> None:
    app.command()(logs)


@with_client
def logs(
    client: "Client",
    operation_id: OperationId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it has ended. Ctrl-C detaches.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, metavar="LINES", help="Only so many of the last lines.")] = None,
) -> None:
    """What an operation's attempts wrote to stdout and stderr.

    As it is into a file or pipe, made harmless on a terminal.

    \b
    ops logs 1f6e --tail 100 -f
    """
    found = client.resolve(operation_id)
    screen, away = Screen() if sys.stdout.isatty() else None, Away()
    with detachable(found, back="ops logs -f"):
        offset = 0 if tail is None else _beginning(client, found, tail)
        for piece in client.logs(
            found, offset=offset, follow=follow, poll_s=POLL_S, patience_s=math.inf, away=away.say
        ):
            sys.stdout.buffer.write(screen.harmless(piece) if screen else piece)
            sys.stdout.buffer.flush()
            away.over()


class Screen:
    """Output as a terminal may have it: what could move its cursor, or make it answer, is shown as �."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def harmless(self, piece: bytes) -> bytes:
        text = self._held + self._decoder.decode(piece)
        unfinished = _UNFINISHED.search(text)
        self._held = unfinished.group() if unfinished else ""
        shown = _HARMFUL.sub("\N{REPLACEMENT CHARACTER}", text.removesuffix(self._held))
        return shown.encode() + (_NO_COLOURS if "\x1b" in shown else b"")


def _beginning(client: "Client", operation_id: UUID, lines: int) -> int:
    """The offset of so many lines before the end, or of what there is without a gap before it."""
    part = client.log_part(operation_id, -TAIL_BYTES)
    while part.start + len(part.data) < part.end:
        part = client.log_part(operation_id, part.start + len(part.data))
    end = len(part.data) - part.data.endswith(b"\n")
    for _ in range(lines):
        if end < 0:
            return part.start
        end = part.data.rfind(b"\n", 0, end)
    return part.start + (end + 1 if lines else len(part.data))
