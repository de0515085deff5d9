"""Draws the state machine of an operation as state-machine.svg: `.venv/bin/python docs/state_machine.py`.

The table of `ops_contract.lifecycle` says what is drawn, this file says where. A test compares the two.
"""

from pathlib import Path

from ops_contract.lifecycle import TERMINAL, TRANSITIONS, Status

FILE = Path(__file__).with_name("state-machine.svg")
WIDTH, HEIGHT = 900, 520
BOX = (124, 48)

# Centres of the boxes.
PLACES = {
    Status.PENDING: (190, 225),
    Status.RUNNING: (480, 225),
    Status.FAILED: (770, 150),
    Status.COMPLETED: (770, 300),
    Status.WAITING: (190, 425),
    Status.CANCELLING: (480, 425),
    Status.CANCELLED: (770, 425),
}
# The line of each move, where its events stand, how they are anchored there, and how many stand on a line.
LINES: dict[tuple[Status | None, Status], tuple[str, tuple[int, int], str, int]] = {
    (None, Status.PENDING): ("M 46 225 H 124", (88, 213), "middle", 1),
    (Status.PENDING, Status.RUNNING): ("M 252 232 H 414", (333, 252), "middle", 1),
    (Status.RUNNING, Status.PENDING): ("M 450 201 C 420 156 260 156 224 197", (337, 126), "middle", 3),
    (Status.RUNNING, Status.COMPLETED): ("M 542 240 C 620 252 640 290 704 297", (650, 258), "start", 1),
    (Status.RUNNING, Status.FAILED): ("M 542 212 C 620 196 640 160 704 153", (646, 196), "start", 2),
    (Status.RUNNING, Status.WAITING): ("M 436 249 L 256 397", (338, 352), "start", 1),
    (Status.WAITING, Status.PENDING): ("M 204 401 V 253", (213, 320), "start", 1),
    (Status.PENDING, Status.CANCELLED): (
        "M 164 249 V 310 Q 164 330 144 330 H 120 Q 100 330 100 350 V 480 Q 100 500 120 500 "
        "H 750 Q 770 500 770 480 V 453",
        (335, 492),
        "middle",
        1,
    ),
    (Status.RUNNING, Status.CANCELLING): ("M 480 249 V 397", (489, 330), "start", 1),
    (Status.WAITING, Status.CANCELLING): ("M 252 425 H 414", (333, 417), "middle", 1),
    (Status.CANCELLING, Status.COMPLETED): ("M 532 401 C 580 366 640 322 704 311", (606, 372), "start", 1),
    (Status.CANCELLING, Status.CANCELLED): ("M 542 425 H 704", (623, 417), "middle", 2),
    (Status.FAILED, Status.PENDING): (
        "M 770 126 V 80 Q 770 60 750 60 H 184 Q 164 60 164 80 V 197",
        (480, 52),
        "middle",
        1,
    ),
    (Status.CANCELLED, Status.PENDING): (
        "M 832 425 H 850 Q 870 425 870 405 V 50 Q 870 30 850 30 H 164 Q 144 30 144 50 V 197",
        (480, 22),
        "middle",
        1,
    ),
}
STYLE = """
  :root { --ground: #ffffff; --text: #1f2328; --line: #6b7280; --box: #f3f4f6; --live: #2563eb;
          --completed: #15803d; --failed: #b91c1c; --cancelled: #6b7280; }
  @media (prefers-color-scheme: dark) {
    :root { --ground: #1b1f24; --text: #e6e8eb; --line: #9aa4b2; --box: #2a3038; --live: #7aa2ff;
            --completed: #4ade80; --failed: #f87171; --cancelled: #9aa4b2; }
  }
  text { font: 14px system-ui, sans-serif; fill: var(--text); }
  .state { font-weight: 600; font-size: 15px; text-anchor: middle; dominant-baseline: central; }
  rect { fill: var(--box); stroke: var(--live); stroke-width: 2; }
  .ended { stroke-width: 4; }
  .completed { stroke: var(--completed); } .failed { stroke: var(--failed); } .cancelled { stroke: var(--cancelled); }
  .waiting { stroke-dasharray: 6 4; }
  path { fill: none; stroke: var(--line); stroke-width: 1.6; marker-end: url(#arrow); }
"""


def svg() -> str:
    """Raises KeyError where the table has a move that has no line here."""
    events: dict[tuple[Status | None, Status], list[str]] = {}
    for t in TRANSITIONS:
        names = events.setdefault((t.source, t.target), [])
        if t.event not in names:
            names.append(t.event)
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title"'
            f' viewBox="0 0 {WIDTH} {HEIGHT}">',
            '<title id="title">The states of an operation and the events that move it</title>',
            f"<style>{STYLE}</style>",
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9"'
            ' orient="auto" markerUnits="userSpaceOnUse"><polygon points="0 0 10 5 0 10" fill="var(--line)"/>'
            "</marker></defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" style="fill: var(--ground); stroke: none"/>',
            '<circle cx="40" cy="225" r="6" fill="var(--line)"/>',
            *(_move(*LINES[move], names) for move, names in events.items()),
            *(_box(status) for status in PLACES),
            "</svg>\n",
        ]
    )


def _box(status: Status) -> str:
    x, y = PLACES[status]
    width, height = BOX
    kind = f"{status} ended" if status in TERMINAL else status
    corner = f'x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="10"'
    return f'<rect class="{kind}" {corner}/><text class="state" x="{x}" y="{y}">{status}</text>'


def _move(line: str, at: tuple[int, int], anchor: str, a_line: int, names: list[str]) -> str:
    x, y = at
    rows = [" · ".join(names[first : first + a_line]) for first in range(0, len(names), a_line)]
    text = "".join(f'<tspan x="{x}" dy="{17 if row else 0}">{words}</tspan>' for row, words in enumerate(rows))
    return f'<path d="{line}"/><text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    FILE.write_text(svg())
    print(FILE)
