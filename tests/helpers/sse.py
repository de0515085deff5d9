"""Reads `GET …/stream` as a dashboard does."""

import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ops_contract.history import AttemptPoints

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Said:
    id: str
    event: str
    data: Any


def read(lines: Iterable[str]) -> Iterator[Said]:
    """The messages; a connection that breaks within one loses it."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield Said(fields["id"], fields["event"], json.loads(fields["data"]))
        if not line:
            fields = {}


async def aread(chunks: AsyncIterable[str]) -> AsyncIterator[Said]:
    """The same of text that comes in pieces, whole messages each or not."""
    text = ""
    async for chunk in chunks:
        *whole, text = (text + chunk).split("\n\n")
        for message in whole:
            for said in read([*message.split("\n"), ""]):
                yield said


@dataclass
class Dashboard:
    """What it knows after the messages that it was told; each of them has to be new."""

    position: str = "0.0.0"
    progress: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    reports: list[tuple[int, int]] = field(default_factory=list)
    _starts: dict[int, int] = field(default_factory=dict)
    _points: dict[str, list[tuple[int, Points]]] = field(default_factory=dict)

    def take(self, said: Said) -> None:
        assert _position(said.id)[0] >= _position(self.position)[0]
        assert _position(said.id)[1:] >= _position(self.position)[1:]
        if said.event == "progress":
            self.progress = said.data
        elif said.event == "event":
            assert _position(said.id)[0] == said.data["seq"]
            self.events.append(said.data)
        elif said.event == "metrics":
            self._take_points(_position(said.id)[1:], AttemptPoints.model_validate(said.data))
        self.position = said.id

    def curves(self) -> dict[str, Points]:
        """The points that count: each attempt's before the start of every later one."""
        return {
            name: [
                (step, value)
                for attempt, points in series
                for step, value in points
                if all(step < start for later, start in self._starts.items() if later > attempt)
            ]
            for name, series in sorted(self._points.items())
        }

    def _take_points(self, report: tuple[int, ...], told: AttemptPoints) -> None:
        self._starts[told.attempt] = told.start_step
        if told.series:
            self.reports.append((report[0], report[1]))
        for series in told.series:
            self._points.setdefault(series.name, []).append((told.attempt, series.points))


def _position(id: str) -> tuple[int, ...]:
    return tuple(map(int, id.split(".")))
