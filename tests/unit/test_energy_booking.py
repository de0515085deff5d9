"""From marks and readings to windows in the outbox, what a killed agent leaves, and the way to the API."""

import asyncio
import logging
import math
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_contract.agents import HoldRef
from ops_contract.energy import EnergyBatch, EnergyWindow, Quality, Source, Use
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.pipe import Mark
from ops_contract.reports import Note
from ops_worker import outbox as outbox_module
from ops_worker.api_client import ApiRefused, ApiUnavailable
from ops_worker.energy import booking
from ops_worker.energy.booking import SHORTEST_S, Booking, Stretch, Stretches, book_gaps, gap
from ops_worker.energy.delivery import EnergyDelivery
from ops_worker.energy.meters import Measured, SlotMeter
from ops_worker.outbox import Booked, Outbox, Sender
from ops_worker.waiting import Backoff

GPU = SlotMeter("GPU-1", Source.NVML_COUNTER, Quality.MEASURED)
PACKAGE = SlotMeter("cpu0", Source.RAPL, Quality.UPPER_BOUND)
USES = [Use.TRAIN, Use.EVALUATE, Use.SAVE, Use.STARTUP]


@dataclass
class Scripted:
    """Devices that take what a function of the time says, read until `read_until_s`."""

    joules: Callable[[float], float] = lambda at_s: 100.0 * at_s
    read_until_s: float = math.inf
    lost_at_s: float = math.inf
    shared: bool = False
    counts: bool = True

    def between(self, device: str, since_s: float, until_s: float) -> Measured | None:
        if until_s > self.lost_at_s:
            return Measured(None, reason="device_lost")
        if until_s > self.read_until_s:
            return None
        return Measured(self.joules(until_s) - self.joules(since_s), error_j=0.5, shared=self.shared)

    def counter(self, device: str, at_s: float) -> float | None:
        return self.joules(at_s) if self.counts and at_s <= min(self.read_until_s, self.lost_at_s) else None

    def baseline_w(self, device: str) -> float | None:
        return 20.0


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Api:
    """Takes windows as the backend does: each once, by its key. `script`: what goes wrong, in turn."""

    script: list[str] = field(default_factory=list)
    refuses: Callable[[EnergyWindow], bool] = lambda window: False
    unknown: set[UUID] = field(default_factory=set)
    had: dict[tuple[UUID, int, str, int], EnergyWindow] = field(default_factory=dict)
    calls: list[HoldRef] = field(default_factory=list)

    async def send_energy(self, ref: HoldRef, body: str) -> None:
        self.calls.append(ref)
        batch = EnergyBatch.model_validate_json(body)
        event = self.script.pop(0) if self.script else "ok"
        if event == "away":
            raise ApiUnavailable("away")
        if ref.operation_id in self.unknown:
            raise ApiRefused(404, OpsError(ErrorCode.NOT_FOUND, "no such hold").body().error)
        if any(map(self.refuses, batch.windows)):
            raise ApiRefused(422, OpsError(ErrorCode.INVALID, "no such value").body().error)
        for window in batch.windows:
            self.had.setdefault((ref.operation_id, ref.attempt, window.device, window.index), window)
        if event == "lost":
            raise ApiUnavailable("the answer was lost")


@pytest.fixture
def ref() -> HoldRef:
    return HoldRef(operation_id=uuid4(), attempt=1)


@pytest.fixture
async def outbox(tmp_path: Path) -> AsyncIterator[Outbox]:
    async with aclosing(Outbox.create(tmp_path, sender())) as outbox:
        yield outbox


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(booking, "POLL_S", 0.001)
    monkeypatch.setattr(booking, "LATE_S", 0.02)
    monkeypatch.setattr(booking, "_LATE_POLL_S", 0.001)


def sender() -> Sender:
    return Sender(uuid4(), "http://127.0.0.1:1", "secret")


def mark(at_s: float, use: Use, step: int, then: Use = Use.TRAIN, **what: object) -> Mark:
    return Mark.model_validate({"at_s": at_s, "use": use, "step": step, "then": then, **what})


def window(index: int = 1, device: str = "cpu", energy_j: float = 1.0) -> EnergyWindow:
    return EnergyWindow(
        index=index,
        device=device,
        source=Source.RAPL,
        quality=Quality.MEASURED,
        use=Use.TRAIN,
        first_step=0,
        until_step=1,
        duration_s=1.0,
        energy_j=energy_j,
    )


async def kept(outbox: Outbox) -> list[EnergyWindow]:
    rows = await outbox.energy(1000)
    return [EnergyWindow.model_validate_json(text) for text in rows.windows.values()] if rows else []


async def counted(outbox: Outbox) -> list[Booked]:
    """Where a hardware's counter is known."""
    return [each for _, holds in await outbox.unended() for each in holds if each.counter_j is not None]


async def eventually(found: Callable[[], Coroutine[object, object, object]]) -> None:
    async with asyncio.timeout(20):
        while not await found():  # noqa: ASYNC110 - an outbox has no event
            await asyncio.sleep(0.001)


async def booked(
    outbox: Outbox,
    ref: HoldRef,
    meters: Sequence[SlotMeter],
    readings: Scripted,
    marks: Sequence[Mark],
    end_s: float,
    in_order: bool = True,
    begin_s: float = 0.0,
) -> list[EnergyWindow]:
    """The windows of an attempt from `begin_s` to `end_s`."""
    clock = Clock(begin_s)
    hold = Booking(ref, meters, readings, outbox, asyncio.Event(), clock=clock)
    hold.begin()
    for each in marks:
        clock.now_s = each.at_s
        hold.mark(each)
    clock.now_s = end_s
    hold.over(end_s, in_order)
    ending = asyncio.create_task(hold.done())
    while not ending.done():
        clock.now_s += 0.001
        await asyncio.sleep(0.001)
    return await kept(outbox)


# ---- marks


marks_of_anything = st.lists(
    st.builds(
        Mark,
        at_s=st.floats(-1e3, 1e4),
        use=st.sampled_from(USES),
        then=st.sampled_from(USES),
        step=st.integers(0, 50),
        epoch=st.none() | st.integers(0, 2),
        units=st.integers(0, 100),
        edge=st.booleans(),
    ),
    max_size=40,
)


@pytest.mark.parametrize(
    ("then", "in_order", "use", "epoch"),
    [
        (Use.TRAIN, False, Use.TRAIN, 3),
        (Use.EVALUATE, False, Use.EVALUATE, 3),
        (Use.SAVE, False, Use.SAVE, None),
        (Use.TRAIN, True, Use.FINISH, None),
    ],
)
def test_what_it_did_last_is_of_its_epoch_where_it_was_of_one(then, in_order, use, epoch):
    stretches = Stretches(0.0, 0)
    stretches.add(mark(1.0, Use.RESTORE, 4, then, epoch=3), 1.0)

    *_, last = stretches.end(2.0, in_order)

    assert (last.use, last.epoch, last.since_s, last.until_s) == (use, epoch, 1.0, 2.0)


@given(marks=marks_of_anything, nows=st.lists(st.floats(0, 1e4), min_size=40, max_size=40), in_order=st.booleans())
def test_whatever_the_marks_say_each_moment_is_in_one_stretch(marks, nows, in_order):
    stretches, found, edges = Stretches(0.0, 0), [], [0.0]
    now_s = 0.0
    for each, later_s in zip(marks, sorted(nows), strict=False):
        now_s = later_s
        found += stretches.add(each, now_s)
        if each.edge:
            edges.append(max(edges[-1], min(each.at_s, now_s), found[-1].until_s if found else 0.0))
    found += stretches.end(now_s + 1, in_order)

    assert found[0].since_s == 0.0
    assert found[-1].until_s == now_s + 1
    assert all(before.until_s == after.since_s for before, after in pairwise(found))
    assert all(stretch.first_step <= stretch.until_step for stretch in found)
    assert sum(stretch.units for stretch in found) == sum(each.units for each in marks)
    # None reaches across an edge, and what is taken for one thing was one.
    assert not [s for s in found for edge_s in edges[1:] if s.since_s < edge_s < s.until_s]
    joules = [stretch.until_s**1.5 - stretch.since_s**1.5 for stretch in found]
    assert math.fsum(joules) == pytest.approx((now_s + 1) ** 1.5)


def test_marks_of_one_use_and_epoch_are_put_together_until_they_are_worth_a_window():
    stretches = Stretches(0.0, 0)
    found = []
    for n in range(1, 31):
        found += stretches.add(mark(0.5 * n, Use.TRAIN, 2 * n, epoch=n // 25, units=3), 0.5 * n)

    assert [(s.since_s, s.until_s, s.epoch, s.first_step, s.until_step, s.units) for s in found] == [
        (0.0, SHORTEST_S, 0, 0, 20, 30),
        (5.0, 10.0, 0, 20, 40, 30),
        (10.0, 12.0, 0, 40, 48, 12),
    ]


def test_a_checkpoint_cuts():
    stretches = Stretches(0.0, 0)

    found = stretches.add(mark(0.5, Use.TRAIN, 5), 9) + stretches.add(mark(0.7, Use.TRAIN, 6, edge=True), 9)
    found += stretches.add(mark(0.9, Use.SAVE, 6), 9)

    assert found == [Stretch(0.0, 0.7, Use.TRAIN, 0, 6)]


@pytest.mark.parametrize(
    ("marks", "in_order", "tail"),
    [
        ([], False, (Use.STARTUP, 7, 7)),
        ([], True, (Use.STARTUP, 7, 7)),
        ([mark(1, Use.RESTORE, 7)], False, (Use.TRAIN, 7, 8)),
        ([mark(1, Use.TRAIN, 9, then=Use.EVALUATE)], False, (Use.EVALUATE, 9, 9)),
        ([mark(1, Use.TRAIN, 9, then=Use.SAVE)], False, (Use.SAVE, 9, 9)),
        ([mark(1, Use.SAVE, 9)], True, (Use.FINISH, 9, 9)),
        ([mark(1, Use.TRAIN, 9)], False, (Use.TRAIN, 9, 10)),
    ],
)
def test_the_rest_of_an_attempt_belongs_to_what_it_was_about(marks, in_order, tail):
    stretches = Stretches(0.0, 7)
    for each in marks:
        stretches.add(each, 5)

    last = stretches.end(6.0, in_order)[-1]

    assert (last.use, last.until_step) == (tail[0], tail[2])
    assert last.first_step <= tail[1]


# ---- windows


async def test_windows_add_up_to_what_each_device_used(outbox, ref):
    marks = [
        mark(1, Use.STARTUP, 0, edge=True, then=Use.SAVE),
        mark(1.5, Use.SAVE, 0),
        *(mark(1.5 + n, Use.TRAIN, n, epoch=0, units=10) for n in range(1, 21)),
        mark(22, Use.EVALUATE, 20, epoch=0),
    ]

    found = await booked(outbox, ref, [GPU, PACKAGE], Scripted(lambda at_s: at_s**1.3 * 100), marks, end_s=30)

    assert {w.device for w in found} == {"GPU-1", "cpu0"}
    for meter in (GPU, PACKAGE):
        mine = [w for w in found if w.device == meter.device]
        assert [w.index for w in mine] == list(range(1, len(mine) + 1))
        assert {(w.source, w.quality) for w in mine} == {(meter.source, meter.quality)}
        assert math.fsum(w.energy_j for w in mine) == pytest.approx(30**1.3 * 100)
        assert math.fsum(w.duration_s for w in mine) == pytest.approx(30)
        assert [w.use for w in mine] == ["startup", "save", *["train"] * 4, "evaluate", "finish"]
        assert [w.epoch for w in mine] == [None, None, 0, 0, 0, 0, 0, None]
        assert sum(w.units for w in mine) == 200
    assert await outbox.unended() == []


async def test_what_is_read_late_is_waited_for_a_moment_and_then_said_to_be_unknown(outbox, ref):
    readings = Scripted(read_until_s=2.0)

    found = await booked(outbox, ref, [GPU], readings, [mark(2, Use.TRAIN, 5, edge=True)], end_s=3)

    assert [(w.energy_j, w.reason) for w in found] == [(200.0, None), (None, "read_too_late")]


async def test_what_is_read_while_it_is_waited_for_is_known(outbox, ref):
    class Late(Scripted):
        asked = 0

        def between(self, device: str, since_s: float, until_s: float) -> Measured | None:
            self.asked += 1
            return super().between(device, since_s, until_s) if self.asked > 1 else None

    found = await booked(outbox, ref, [GPU], Late(), [], end_s=3)

    assert [(w.energy_j, w.reason) for w in found] == [(300.0, None)]


async def test_the_end_is_not_waited_for_until_it_is_looked_at_again(outbox, ref, monkeypatch):
    monkeypatch.setattr(booking, "POLL_S", 3600.0)
    clock = Clock()
    hold = Booking(ref, [GPU], Scripted(), outbox, asyncio.Event(), clock=clock)
    hold.begin()
    await eventually(outbox.unended)

    hold.over(3.0, in_order=True)
    async with asyncio.timeout(20):
        await hold.done()

    assert [w.energy_j for w in await kept(outbox)] == [300.0]


async def test_that_an_outbox_takes_nothing_is_in_the_log_and_no_trouble_of_the_holds(outbox, ref, caplog, monkeypatch):
    async def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(outbox, "book", full)
    hold = Booking(ref, [GPU], Scripted(), outbox, asyncio.Event())
    hold.begin()
    hold.over(0.0, in_order=True)
    await hold.done()

    (record,) = caplog.records
    assert (record.getMessage(), record.levelname) == ("not all energy is booked", "ERROR")
    assert record.operation_id == ref.operation_id


async def test_a_lost_device_makes_what_follows_unknown_and_keeps_what_was_measured(outbox, ref):
    marks = [mark(2, Use.TRAIN, 5, edge=True), mark(4, Use.TRAIN, 9, edge=True)]

    found = await booked(outbox, ref, [GPU], Scripted(lost_at_s=3), marks, end_s=5)

    assert [(w.energy_j, w.reason) for w in found] == [(200.0, None), (None, "device_lost"), (None, "device_lost")]


async def test_what_others_used_too_is_an_upper_bound(outbox, ref):
    found = await booked(outbox, ref, [GPU], Scripted(shared=True), [], end_s=5)

    assert [w.quality for w in found] == [Quality.UPPER_BOUND]


async def test_an_estimate_of_one_slot_counts_for_each_of_the_holds(outbox, ref):
    estimate = SlotMeter("cpu", Source.ESTIMATE, Quality.ESTIMATED, times=3)

    found = await booked(outbox, ref, [estimate], Scripted(), [], end_s=5)

    assert [(w.energy_j, w.error_j) for w in found] == [(1500.0, 1.5)]
    assert Measured(None, reason="device_lost").times(3) == Measured(None, reason="device_lost")


async def test_without_a_meter_there_is_one_window_that_says_so(outbox, ref):
    marks = [mark(4 + n, Use.TRAIN, n, epoch=n // 10, units=2) for n in range(1, 31)]

    found = await booked(outbox, ref, [], Scripted(), marks, end_s=35, in_order=False, begin_s=4)

    (only,) = found
    assert (only.device, only.source, only.quality, only.energy_j, only.reason) == ("cpu", None, None, None, "no_meter")
    assert (only.first_step, only.until_step, only.units, only.duration_s) == (0, 31, 60, 31)
    assert await outbox.unended() == []


async def test_an_attempt_that_never_began_has_no_window(outbox, ref):
    await Booking(ref, [GPU], Scripted(), outbox, asyncio.Event()).done()

    assert await kept(outbox) == []


# ---- what a killed agent leaves


async def test_a_successor_knows_until_where_a_killed_agent_had_booked_and_books_the_rest_once(tmp_path, ref):
    dead, clock, readings = Outbox.create(tmp_path, sender()), Clock(), Scripted()
    hold = Booking(ref, [GPU], readings, dead, asyncio.Event(), clock=clock)
    hold.begin()
    clock.now_s = 6.0
    hold.mark(mark(6.0, Use.TRAIN, 12, edge=True))
    await eventually(lambda: kept(dead))
    hold.stop()
    await asyncio.sleep(0.01)
    _die(dead)

    (orphan,) = Outbox.orphans(tmp_path)
    now_s = time.monotonic()
    await book_gaps(orphan, Scripted(), {"GPU-1"})
    assert await orphan.unended() == []  # whoever comes after this one has nothing to add

    first, rest = await kept(orphan)
    assert (first.index, first.energy_j) == (1, 600.0)
    assert (rest.index, rest.use, rest.first_step) == (2, Use.UNATTRIBUTED, 12)
    assert rest.energy_j >= 100 * now_s - 600
    assert rest.duration_s >= now_s - 6
    await orphan.aclose()


async def test_a_gap_of_what_is_not_measured_here_is_not_asked_for_and_the_log_says_what_there_was(outbox, ref, caplog):
    mine, other = replace(BOOKED, boot_id=booking.boot_id()), replace(BOOKED, boot_id=booking.boot_id(), device="GPU-2")
    await outbox.book(ref, [], [mine, other])

    with caplog.at_level(logging.INFO, booking.log.name):
        await book_gaps(outbox, Scripted(lambda at_s: 250.0), {"GPU-1"})

    assert [(w.device, w.energy_j, w.reason) for w in await kept(outbox)] == [
        ("GPU-1", 150.0, None),
        ("GPU-2", None, "no_counter"),
    ]
    (record,) = caplog.records
    assert record.getMessage() == "what a killed agent had not booked: GPU-1 150 J, GPU-2 no_counter"
    assert record.operation_id == ref.operation_id


async def test_one_without_a_meter_that_is_killed_is_known_to_have_had_none(outbox, ref):
    hold = Booking(ref, [], Scripted(), outbox, asyncio.Event(), step=4, clock=Clock(3.0))
    hold.begin()
    await eventually(outbox.unended)
    hold.stop()

    assert await outbox.unended() == [(ref, [Booked("cpu", None, None, booking.boot_id(), 3.0, step=4)])]


async def test_one_killed_before_its_first_window_is_known_from_its_beginning(tmp_path, ref):
    dead, clock = Outbox.create(tmp_path, sender()), Clock(3.0)
    hold = Booking(ref, [GPU], Scripted(), dead, asyncio.Event(), step=4, clock=clock)
    hold.begin()
    await eventually(lambda: counted(dead))
    hold.stop()

    (begun,) = await counted(dead)

    assert (begun.counter_j, begun.at_s, begun.step, begun.index) == (300.0, 3.0, 4, 0)
    await dead.aclose()


BOOKED = Booked("GPU-1", Source.NVML_COUNTER, Quality.MEASURED, "boot", 5.0, step=9, index=3, counter_j=100.0)


@pytest.mark.parametrize(
    ("before", "counter_j", "energy_j", "reason"),
    [
        (BOOKED, 150.0, 50.0, None),
        (BOOKED, 100.0, 0.0, None),  # known to be nothing
        (BOOKED, 99.0, None, "counter_reset"),
        (BOOKED, None, None, "no_counter"),
        (replace(BOOKED, counter_j=None), 150.0, None, "no_counter"),
        (replace(BOOKED, boot_id="before"), 150.0, None, "rebooted"),
        (replace(BOOKED, source=None, quality=None, device="cpu", counter_j=None), None, None, "no_meter"),
    ],
)
def test_a_gap_that_cannot_be_known_says_why(before, counter_j, energy_j, reason):
    found = gap(before, counter_j, "boot", 8.0)

    assert (found.energy_j, found.reason, found.index, found.use) == (energy_j, reason, 4, Use.UNATTRIBUTED)


async def test_a_fenced_hold_keeps_its_joules(outbox, ref):
    await outbox.add(ref, [Note(message="a")])
    await outbox.book(ref, [window()], [])

    await outbox.forget(ref)

    assert await outbox.holds() == []
    assert len(await kept(outbox)) == 1


async def test_an_outbox_with_nothing_but_joules_is_kept_and_found(tmp_path, ref):
    waiting, unended = Outbox.create(tmp_path, sender()), Outbox.create(tmp_path, sender())
    await waiting.book(ref, [window()], [])
    await unended.book(ref, [], [BOOKED])
    await waiting.aclose()
    await unended.aclose()

    orphans = Outbox.orphans(tmp_path)

    assert {o.sender.incarnation for o in orphans} == {waiting.sender.incarnation, unended.sender.incarnation}
    for orphan in orphans:
        if rows := await orphan.energy(10):
            await orphan.drop_energy(list(rows.windows))
        await orphan.book(ref, [], [])
        await orphan.aclose()
    assert list(tmp_path.iterdir()) == []


async def test_the_outbox_of_an_agent_that_knew_no_energy_is_read(tmp_path, ref):
    dead = Outbox.create(tmp_path, sender())
    await dead.add(ref, [Note(message="a")])
    _die(dead)
    with closing(sqlite3.connect(dead._path)) as database:
        database.executescript("DROP TABLE energy; DROP TABLE measured;")

    (orphan,) = Outbox.orphans(tmp_path)

    assert (await orphan.holds(), await orphan.unended(), await kept(orphan)) == ([ref], [], [])
    await orphan.aclose()


# ---- to the API


async def deliver(outbox: Outbox, api: Api) -> None:
    await EnergyDelivery(api, outbox, outbox.sender.incarnation, Backoff(1.0, sleep=_at_once)).drain()


async def _at_once(pause_s: float) -> None: ...


@settings(max_examples=25)
@given(
    script=st.lists(st.sampled_from(["ok", "away", "lost"]), max_size=20),
    poison=st.sets(st.integers(1, 30), max_size=3),
)
async def test_whatever_fails_each_window_arrives_once_and_only_a_refused_one_is_set_aside(
    tmp_path_factory, script, poison
):
    outbox = Outbox.create(tmp_path_factory.mktemp("outbox"), sender())
    refs = [HoldRef(operation_id=uuid4(), attempt=n) for n in (1, 2)]
    for n in range(1, 31):
        await outbox.book(refs[n % 2], [window(n, energy_j=n)], [])
    api = Api(list(script), refuses=lambda window: window.index in poison)

    await deliver(outbox, api)

    assert sorted(key[3] for key in api.had) == [n for n in range(1, 31) if n not in poison]
    assert await kept(outbox) == []
    await outbox.aclose()


async def test_the_oldest_go_first_and_a_hold_that_the_api_does_not_know_is_dropped(outbox, ref, caplog):
    other = HoldRef(operation_id=uuid4(), attempt=1)
    await outbox.book(other, [window()], [])
    await outbox.book(ref, [window()], [])
    api = Api(unknown={other.operation_id})

    with caplog.at_level(logging.WARNING):
        await deliver(outbox, api)

    assert api.calls == [other, ref]
    assert "1 energy windows dropped" in caplog.text
    assert await kept(outbox) == []


async def test_a_refused_window_is_in_the_log_as_it_was(outbox, ref, caplog):
    await outbox.book(ref, [window(energy_j=123.25)], [])

    await deliver(outbox, Api(refuses=lambda window: True))

    assert "set aside" in caplog.text
    assert "123.25" in caplog.text


async def test_an_empty_outbox_sends_nothing(outbox):
    api = Api()

    await deliver(outbox, api)

    assert api.calls == []


def _die(dead: Outbox) -> None:
    """As by SIGKILL: descriptors are closed, nothing else happens."""
    dead._thread.shutdown()
    dead._database.close()
    outbox_module.os.close(dead._lock)
